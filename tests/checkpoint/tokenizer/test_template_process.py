"""Chat templates that would never end, fill the memory, read files or reach Python: each fails, and the next one is rendered."""

from __future__ import annotations

from datetime import datetime

import pytest

from elmexport.checkpoint.tokenizer.template_process import TemplateFailure, render


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it runs for more than 0.5 seconds"),
        ("{{ 9 ** (9 ** 9) }}", "it runs for more than 0.5 seconds"),
        ("{{ 'x' * 9999999999 }}", "too much memory|runs for more"),
        ("{% set n = namespace(x='xxxx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "too much memory|runs for more"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "it makes a prompt of more than"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError|access to attribute"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ cycler.__init__.__globals__.os.environ }}", "access to attribute"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "RecursionError|ended the process|too much memory"),
    ],
)
def test_templates_that_would_harm(template: str, reason: str) -> None:
    for _ in range(2):  # the process that rendered it, and the next one
        with pytest.raises(TemplateFailure, match=reason):
            render(template, {}, datetime(2026, 1, 1), seconds=0.5)
    assert render("{{ strftime_now('%Y') }} {{ name }}", {"name": "é"}, datetime(2026, 1, 1)) == "2026 é"
