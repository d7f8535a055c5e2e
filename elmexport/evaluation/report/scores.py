"""Tables of task scores: the scores of one report, and the drops of several."""

from __future__ import annotations

from collections.abc import Sequence

from elmexport.evaluation.report.overview import task_names
from elmexport.evaluation.report.table import Cell, Column, Kind, Table, Tone, number_column
from elmexport.evaluation.report.wording import (
    Finding,
    any_published,
    factor,
    interval,
    metric_words,
    p_value,
    points,
    published,
    reading,
    score,
)
from elmexport.evaluation.results import Report, TaskComparison, TaskResult

_TONES = {Finding.WORSE: Tone.BAD, Finding.BETTER: Tone.GOOD}
_COMPARED = (number_column("drop, points", "drop"), number_column("95 % interval"), Column("reading", Kind.SENTENCE))
_REFERENCE, _OWN, _PUBLISHED = number_column("reference", "ref"), number_column("artifact", "this"), number_column("published", "publ.")
_PAIRED = (number_column("lost"), number_column("won"), number_column("McNemar p", "p"))


def score_table(report: Report, caption: str) -> Table | None:
    """Scores by task, beside the reference's where there is one; None where no task was run."""
    if not report.tasks:
        return None
    paper = any_published(report)
    columns = [Column("task"), Column("metric", Kind.QUALIFIER), number_column("items", "n")]
    columns += [*_COMPARED, _REFERENCE, _OWN, *_PAIRED] if report.reference else [_OWN]
    columns += [_PUBLISHED] if paper else []
    rows = []
    for name, task in report.tasks.items():
        row = [Cell(name), Cell(f"{metric_words(task)}, {task.fewshot}-shot"), Cell(f"{task.n:,}", task.n)]
        row += _beside_reference(task) if report.reference else [_score(task, task.metrics[task.metric])]
        row += [Cell() if task.published is None else Cell(published(task.published), task.published)] if paper else []
        rows.append(tuple(row))
    return Table(caption, tuple(columns), tuple(rows), sortable=True)


def _beside_reference(task: TaskResult) -> list[Cell]:
    compared, found, own = task.comparison, reading(task), _score(task, task.metrics[task.metric])
    words = Cell(found.words, tone=_TONES.get(found.finding))
    if compared is None:
        return [Cell(), Cell(), words, Cell(), own, Cell(), Cell(), Cell()]
    flips, p = compared.flips, compared.mcnemar_p
    return [
        _change(compared),
        Cell() if compared.drop_ci is None else Cell(interval(compared.drop_ci)),
        words,
        _score(task, compared.reference[task.metric]),
        own,
        Cell() if flips is None else Cell(str(flips.right_to_wrong), flips.right_to_wrong),
        Cell() if flips is None else Cell(str(flips.wrong_to_right), flips.wrong_to_right),
        Cell() if p is None else Cell(p_value(p), p),
    ]


def _change(compared: TaskComparison, tone: Tone | None = None) -> Cell:
    """The drop in points; of metrics that are perplexities, the factor."""
    if compared.drop is not None:
        return Cell(points(compared.drop), compared.drop, tone)
    return Cell() if compared.ratio is None else Cell(factor(compared.ratio), tone=tone)


def _score(task: TaskResult, value: float) -> Cell:
    return Cell(score(task, value), value)


def drop_table(reports: Sequence[Report]) -> Table | None:
    """Drops by task, a column for each report by its number; None where no task was run."""
    names = task_names(reports)
    rows = [(Cell(name), *(_drop(report.tasks.get(name)) for report in reports)) for name in names]
    if not rows:
        return None
    columns = (Column("task"), *(number_column(str(i)) for i in range(1, len(reports) + 1)))
    notes = ("Drops in percentage points; columns are the numbers of the artifacts.",)
    marked = "beyond noise: the 95 % interval excludes 0"
    return Table("All tasks, all artifacts", columns, tuple(rows), notes, marked, sortable=True)


def _drop(task: TaskResult | None) -> Cell:
    if task is None or task.comparison is None:
        return Cell()
    return _change(task.comparison, _TONES.get(reading(task).finding))
