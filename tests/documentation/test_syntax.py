"""The parsers refuse what they are to refuse."""

from __future__ import annotations

import pytest

from tests.documentation.syntax import syntax_error


@pytest.mark.parametrize(
    ("language", "good", "bad"),
    [
        ("swift", "func f(_ x: Int) -> Int { x + 1 }\n", "func f(_ x: Int) -> { return + }\n"),
        ("csharp", "int F(int x) => x + 1;\n", "int F(int x => ;\n"),
        ("js", "export const f = async (x) => await x;\n", "const f = (x => ;\n"),
    ],
)
def test_parsers(language: str, good: str, bad: str) -> None:
    assert syntax_error(language, good) is None
    assert syntax_error(language, bad) is not None
