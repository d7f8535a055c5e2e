"""Reports as text for a terminal of 80 columns, or for a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from elmexport.evaluation.report.overview import common_tasks, differences, labels, mean_drop, task_names
from elmexport.evaluation.report.wording import (
    MINUS,
    Finding,
    against,
    any_published,
    factor,
    facts,
    interval,
    largest_drop,
    megabytes,
    metric_words,
    number,
    p_value,
    percent,
    points,
    published,
    reading,
    score,
    tasks,
    text_figures,
    verdict,
)
from elmexport.evaluation.results import Gate, Report, TaskResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_UNLIMITED = 10_000  # columns: nobody looks at the width of a pipe, and a cut line is hard to search
_STYLES = {Finding.WORSE: "red", Finding.BETTER: "green"}


def print_reports(reports: Sequence[Report], console: Console | None = None) -> None:
    """Print one report, or a comparison of several, on `console` (stdout where None). Piped text has no colour and no wrapped lines."""
    from rich.console import Console

    out = Console(highlight=False) if console is None else console
    if not out.is_terminal:
        out = Console(file=out.file, width=_UNLIMITED, color_system=None, highlight=False)
    if len(reports) == 1:
        _print_one(reports[0], out)
    else:
        _print_several(reports, out)


def _print_one(report: Report, out: Console) -> None:
    _say(out, report.artifact.label)
    _say(out, f"{facts(report.artifact)}. {against(report)}")
    if report.tasks:
        _show(out, _task_table(report))
        _say(out, f"\n{_metrics(report)}")
    if report.tasks and report.reference:
        _show(out, _reading_table(report))
    figures = text_figures(report)
    if figures:
        table = _table("text", "")
        for row in figures:
            table.add_row(*_plain(row))
        _show(out, table)
    if report.gates:
        _say(out, "")
        _gates(out, report.gates)
    summary = " ".join(filter(None, (verdict(report), largest_drop(report))))
    if summary:
        _say(out, f"\n{summary}")


def _task_table(report: Report) -> Table:
    paper = (">publ.",) if any_published(report) else ()
    before, after = ((">ref",), (">drop", ">95 % interval", ">lost", ">won", ">p")) if report.reference else ((), ())
    table = _table("task", ">n", *paper, *before, ">this", *after, gap=1)
    for name, task in report.tasks.items():
        own, stated = score(task, task.metrics[task.metric]), "" if task.published is None else published(task.published)
        reference, *compared = _compared(task)
        head = (name, str(task.n), *((stated,) if paper else ()))
        cells = (*head, reference, own, *compared) if report.reference else (*head, own)
        table.add_row(*_plain(cells), style=_STYLES.get(reading(task).finding))
    return table


def _metrics(report: Report) -> str:
    """Which metric and how many examples in the prompt, by task."""
    groups: dict[str, list[str]] = {}
    for name, task in report.tasks.items():
        groups.setdefault(f"{metric_words(task)}, {task.fewshot}-shot", []).append(name)
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in groups.items())


def _compared(task: TaskResult) -> tuple[str, str, str, str, str, str]:
    """The reference's score, the drop, its interval, items lost and won, McNemar's p."""
    compared = task.comparison
    if compared is None:
        return "", "", "", "", "", ""
    reference = score(task, compared.reference[task.metric])
    if compared.drop is None:
        return reference, "" if compared.ratio is None else factor(compared.ratio), "", "", "", ""
    lost, won = ("", "") if compared.flips is None else (str(compared.flips.right_to_wrong), str(compared.flips.wrong_to_right))
    ends = "" if compared.drop_ci is None else interval(compared.drop_ci)
    return reference, points(compared.drop), ends, lost, won, "" if compared.mcnemar_p is None else p_value(compared.mcnemar_p)


def _reading_table(report: Report) -> Table:
    table = _table("task", "reading")
    for name, task in report.tasks.items():
        found = reading(task)
        table.add_row(*_plain((name, found.words)), style=_STYLES.get(found.finding))
    return table


def _print_several(reports: Sequence[Report], out: Console) -> None:
    _say(out, f"{len(reports)} artifacts compared")
    common = common_tasks(reports)
    table = _table("", "artifact", ">MB", ">bits", ">KL mean", ">KL 99 %", ">top-1", ">perpl.", ">drop")
    for i, (name, report) in enumerate(zip(labels(reports), reports, strict=True), 1):
        artifact, kl, perplexity, drop = report.artifact, report.kl, report.perplexity, mean_drop(report, common)
        size = "" if artifact.bytes is None else megabytes(artifact.bytes)
        bits = "" if artifact.bits_per_weight is None else f"{artifact.bits_per_weight:.1f}"
        text = ("", "", "") if kl is None else (number(kl.mean), number(kl.p99), percent(kl.top1_agreement))
        ratio = "" if perplexity is None or perplexity.ratio is None else factor(perplexity.ratio)
        table.add_row(*_plain((str(i), name, size, bits, *text, ratio, "" if drop is None else points(drop))))
    _show(out, table)
    if common:
        _say(out, f"drop: points, mean over {tasks(len(common))}; KL: nats per token; top-1: % of tokens")
    if task_names(reports):
        _show(out, _drop_matrix(reports))
        _say(out, "drop in percentage points; * beyond noise: the 95 % interval excludes 0")
    for note in differences(reports):
        _say(out, f"note: {note}")
    for name, report in zip(labels(reports), reports, strict=True):
        if report.gates:
            _say(out, f"\n{name}")
            _gates(out, report.gates)


def _drop_matrix(reports: Sequence[Report]) -> Table:
    table = _table("task", *(f">{i}" for i in range(1, len(reports) + 1)))
    for name in task_names(reports):
        table.add_row(*_plain((name, *(_drop_cell(report.tasks.get(name)) for report in reports))))
    return table


def _drop_cell(task: TaskResult | None) -> str:
    if task is None or task.comparison is None:
        return ""
    compared = task.comparison
    text = points(compared.drop) if compared.drop is not None else factor(compared.ratio) if compared.ratio is not None else ""
    return text + ("*" if reading(task).finding in (Finding.WORSE, Finding.BETTER) else " ")


def _gates(out: Console, gates: Sequence[Gate]) -> None:
    for gate in gates:
        _say(out, f"{'passed' if gate.passed else 'FAILED'}  {gate.name}: {gate.reason}", style="" if gate.passed else "bold red")


def _table(*columns: str, gap: int = 2) -> Table:
    """An empty table with `gap` spaces between columns; one whose name starts with `>` is aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), show_edge=False, pad_edge=False)
    for name in columns:
        if name.startswith(">"):
            table.add_column(name[1:], justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def _show(out: Console, table: Table) -> None:
    out.print()
    out.print(table)


def _say(out: Console, text: str, style: str = "") -> None:
    from rich.text import Text

    out.print(Text(text.replace(MINUS, "-"), style))


def _plain(cells: Sequence[str]) -> list[Text]:
    """Cells in characters that any terminal's encoding has, and in which no square bracket is markup."""
    from rich.text import Text

    return [Text(cell.replace(MINUS, "-").replace("×", "x").replace("∞", "inf")) for cell in cells]
