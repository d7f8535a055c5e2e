"""The tables of the page: artifacts, gates, tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from elmexport.evaluation.report.markup import Cell, cell, judged, table, text
from elmexport.evaluation.report.overview import common_tasks, labels, mean_drop, task_names
from elmexport.evaluation.report.wording import (
    Finding,
    any_published,
    factor,
    interval,
    items,
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
)
from elmexport.evaluation.results import Report, TaskResult

_CLASSES = {Finding.WORSE: "words bad", Finding.BETTER: "words good"}


def artifact_table(reports: Sequence[Report]) -> str:
    """The artifacts of a comparison, with size and what the whole of each cost."""
    common = common_tasks(reports)
    rows: list[tuple[Cell, ...]] = []
    for i, (name, report) in enumerate(zip(labels(reports), reports, strict=True), 1):
        artifact, kl, perplexity, mean = report.artifact, report.kl, report.perplexity, mean_drop(report, common)
        ratio = None if perplexity is None else perplexity.ratio
        rows.append(
            (
                cell(f"{i}. {name}", i),
                cell(f"{artifact.quant}, {artifact.engine}"),
                _optional(artifact.bytes, megabytes),
                _optional(artifact.bits_per_weight, lambda bits: f"{bits:.2f}"),
                _optional(None if kl is None else kl.mean, number),
                _optional(None if kl is None else kl.p99, number),
                _optional(None if kl is None else kl.top1_agreement, percent),
                _optional(ratio, factor),
                _optional(mean, points),
            )
        )
    columns = (
        "artifact",
        "quantization, engine",
        ">MB",
        ">bits per weight",
        ">KL mean",
        ">KL 99 %",
        ">top-1, %",
        ">perplexity",
        ">mean drop",
    )
    caption = (
        "KL divergence in nats per token; top-1: tokens whose most likely prediction is the reference's; perplexity: times the reference's"
    )
    caption += f"; mean drop: points, over {tasks(len(common))} that every artifact ran" if common else ""
    return table(caption, columns, rows, sortable=True)


def _optional(value: float | None, show: Callable[..., str]) -> Cell:
    return cell("") if value is None else cell(show(value), value)


def gate_table(reports: Sequence[Report]) -> str:
    """Every gate with its outcome and reason; empty where none was set."""
    several = len(reports) > 1
    rows = [
        (
            *([cell(name)] if several else []),
            Cell(judged("✓ passed" if gate.passed else "✗ failed", gate.passed)),
            cell(gate.name),
            cell(gate.reason),
        )
        for name, report in zip(labels(reports), reports, strict=True)
        for gate in report.gates
    ]
    columns = (*(("artifact",) if several else ()), "outcome", "gate", "reason")
    return table("Limits that the artifact must keep", columns, rows) if rows else ""


def task_tables(reports: Sequence[Report]) -> str:
    """Scores by task; of several reports a matrix of drops, and the scores of each to unfold."""
    if len(reports) == 1:
        return _task_table(reports[0], "Scores by task")
    tables = [
        f"<details><summary>{i}. {text(name)}: scores by task</summary>{_task_table(report, f'{name}: scores by task')}</details>"
        for i, (name, report) in enumerate(zip(labels(reports), reports, strict=True), 1)
        if report.tasks
    ]
    return _drop_matrix(reports) + "\n".join(tables)


def _drop_matrix(reports: Sequence[Report]) -> str:
    rows = []
    for name in task_names(reports):
        found = [report.tasks.get(name) for report in reports]
        rows.append((cell(name), *(_drop_cell(task) for task in found)))
    columns = ("task", *(f">{i}" for i in range(1, len(reports) + 1)))
    caption = "Drop in percentage points, by the numbers of the artifacts. ▼ worse, ▲ better, beyond noise: the 95 % interval excludes 0"
    return table(caption, columns, rows, sortable=True) if rows else ""


def _drop_cell(task: TaskResult | None) -> Cell:
    if task is None or task.comparison is None or task.comparison.drop is None:
        return cell("")
    found = reading(task).finding
    mark = {Finding.WORSE: "▼ ", Finding.BETTER: "▲ "}.get(found, "")
    return cell(mark + points(task.comparison.drop), task.comparison.drop, {Finding.WORSE: "bad", Finding.BETTER: "good"}.get(found, ""))


def _task_table(report: Report, caption: str) -> str:
    if not report.tasks:
        return ""
    compared = (">drop, points", ">95 % interval", "reading", ">reference", ">artifact", ">lost", ">won", ">McNemar p")
    paper = any_published(report)
    columns = ("task", *(compared if report.reference else (">artifact",)), *((">published",) if paper else ()))
    rows = []
    for name, task in report.tasks.items():
        row = [Cell(f'{text(name)}<br><span class="soft">{text(f"{metric_words(task)}; {task.fewshot}-shot; {items(task.n)}")}</span>')]
        row += _compared(task) if report.reference else [_score(task, task.metrics)]
        row += [_optional(task.published, published)] if paper else []
        rows.append(row)
    return table(caption, columns, rows, sortable=True)


def _compared(task: TaskResult) -> list[Cell]:
    found, against, own = reading(task), task.comparison, _score(task, task.metrics)
    words = cell(found.words, class_=_CLASSES.get(found.finding, "words"))
    if against is None:
        return [cell(""), cell(""), words, cell(""), own, cell(""), cell(""), cell("")]
    change = cell("") if against.ratio is None else cell(factor(against.ratio))
    lost, won = (None, None) if against.flips is None else (against.flips.right_to_wrong, against.flips.wrong_to_right)
    return [
        change if against.drop is None else cell(points(against.drop), against.drop),
        cell("" if against.drop_ci is None else interval(against.drop_ci)),
        words,
        _score(task, against.reference),
        own,
        _optional(lost, str),
        _optional(won, str),
        _optional(against.mcnemar_p, p_value),
    ]


def _score(task: TaskResult, metrics: Mapping[str, float]) -> Cell:
    return cell(score(task, metrics[task.metric]), metrics[task.metric])
