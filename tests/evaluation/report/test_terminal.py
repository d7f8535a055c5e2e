from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from elmexport.evaluation.report.terminal import print_reports
from elmexport.evaluation.results import Report
from tests.evaluation.report import examples

GATES = [examples.gate("max-drop", 2.0, 13.0, "arc_easy"), examples.gate("max-kl", 0.1, 0.0125)]


def printed(reports: Sequence[Report], *, terminal: int | None = None) -> str:
    """The text, for a pipe or for a terminal of so many columns without colour."""
    out = io.StringIO()
    console = Console(file=out, width=terminal, force_terminal=terminal is not None, color_system=None, highlight=False)
    print_reports(reports, console)
    return out.getvalue()


@pytest.mark.parametrize("reports", [[examples.report(gates=GATES)], [examples.report(reference=False)], examples.family()])
def test_eighty_columns_hold_everything_without_broken_words(reports: list[Report]) -> None:
    text = printed(reports, terminal=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for name in (*examples.TASKS, *(report.artifact.label for report in reports)):
        assert name in text


def test_a_row_says_everything_about_its_task() -> None:
    report = examples.report(gates=GATES)
    task = report.tasks["arc_easy"]
    assert task.comparison is not None and task.comparison.drop_ci is not None and task.comparison.flips is not None
    row = next(line for line in printed([report]).splitlines() if line.startswith("arc_easy"))
    low, high = task.comparison.drop_ci
    assert row.split() == [
        *("arc_easy", "100", f"{task.comparison.drop:.1f}", f"[{low:.1f},", f"{high:.1f}]"),
        *(f"{100 * task.comparison.reference['acc_norm']:.1f}", f"{100 * task.metrics['acc_norm']:.1f}"),
        *(str(task.comparison.flips.right_to_wrong), str(task.comparison.flips.wrong_to_right), "<0.001", "45.08"),
    ]


def test_noise_is_said_in_words() -> None:
    assert re.search(r"arc_challenge +within noise: 100 items cannot show a drop below \d+\.\d points", printed([examples.report()]))


def test_gates_stand_with_their_reasons() -> None:
    text = printed([examples.report(gates=GATES)])
    assert "FAILED  max-drop: arc_easy: 13 against 2 allowed" in text
    assert "passed  max-kl: 0.0125 against 0.1 allowed" in text
    assert "1 of 2 gates failed." in text


def test_a_pipe_gets_no_escapes_and_no_wrapped_lines() -> None:
    label = "a-label-" + "x" * 100
    text = printed([examples.report(label), examples.report()])
    assert "\x1b" not in text
    assert any(label in line and "0.0125" in line for line in text.splitlines())


def test_square_brackets_in_names_are_no_markup() -> None:
    text = printed([examples.report("[red]model[/red]", gates=[{**GATES[0], "reason": "[bold]why[/bold]"}])])
    assert "[red]model[/red]" in text
    assert "[bold]why[/bold]" in text


def test_names_cannot_steer_a_terminal() -> None:
    text = printed([examples.report("a\x1b]0;title\x07b", gates=[{**GATES[0], "reason": "\x1b[2Jwhy"}])], terminal=80)
    assert "\x1b" not in text and "\x07" not in text
    assert "a?]0;title?b" in text and "?[2Jwhy" in text


def test_a_terminal_without_unicode_gets_ascii_figures() -> None:
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding="ascii")
    print_reports([examples.report(gates=GATES)], Console(file=out, highlight=False))  # would raise UnicodeEncodeError
    out.flush()
    assert b"arc_challenge" in written.getvalue()


def test_a_comparison_marks_what_is_beyond_noise() -> None:
    lines = printed(examples.family()).splitlines()
    row = next(line for line in lines if line.startswith("arc_challenge"))
    drops = [report.tasks["arc_challenge"].comparison for report in examples.family()]
    expected = [f"{c.drop:.1f}" + ("*" if c.drop_ci[0] > 0 else "") for c in drops if c and c.drop is not None and c.drop_ci is not None]
    assert row.split()[1:] == expected


def test_reports_that_do_not_compare_say_so() -> None:
    text = printed([examples.report(tasks=["arc_easy", "boolq"]), examples.report("other", items=50, tasks=["arc_easy"])])
    assert "note: arc_easy: not the same items in every report (100, 50 items)." in text
    assert "note: other was not run on boolq." in text
