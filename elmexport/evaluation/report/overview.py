"""Comparison of several reports: common tasks, mean drops, and what makes them hard to compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elmexport.evaluation.results import Report


def task_names(reports: Sequence[Report]) -> list[str]:
    """Names of the tasks of all reports, each once, in the order they come."""
    return list(dict.fromkeys(name for report in reports for name in report.tasks))


def labels(reports: Sequence[Report]) -> list[str]:
    """Labels of the reports: the artifact's, with its path where two have the same."""
    names = [report.artifact.label for report in reports]
    return [name if names.count(name) == 1 else f"{name} ({report.artifact.path})" for name, report in zip(names, reports, strict=True)]


def drop(report: Report, task: str) -> float | None:
    """Drop on a task in points; None where it was not run, or not compared."""
    found = report.tasks.get(task)
    return found.comparison.drop if found is not None and found.comparison is not None else None


def common_tasks(reports: Sequence[Report]) -> list[str]:
    """Names of the tasks that have a drop in every report: only over these are mean drops comparable."""
    return [name for name in task_names(reports) if all(drop(report, name) is not None for report in reports)]


def mean_drop(report: Report, tasks: Sequence[str]) -> float | None:
    """Mean drop over `tasks` in points; each task counts the same. None where there are none."""
    drops = [value for name in tasks if (value := drop(report, name)) is not None]
    return sum(drops) / len(drops) if drops else None


def differences(reports: Sequence[Report]) -> list[str]:
    """Differences in how the reports were made, one sentence each; empty where their figures compare directly."""
    return list(_differences(reports))


def _differences(reports: Sequence[Report]) -> Iterator[str]:
    models = {report.artifact.model.identity or report.artifact.model.name: report.artifact.model.name for report in reports}
    if len(models) > 1:
        yield f"The artifacts come from {len(models)} different models ({', '.join(models.values())}): compare drops, not sizes against drops."
    references = {report.reference.identity if report.reference else None for report in reports}
    if len(references) > 1 and len(models) == 1:
        yield "The artifacts were not compared with the same reference."
    for name in task_names(reports):
        done = [report.tasks[name] for report in reports if name in report.tasks]
        if len({frozenset(item.hash for item in task.items) for task in done}) > 1:
            counts = ", ".join(f"{task.n:,}" for task in done)
            yield f"{name}: not the same items in every report ({counts} items)."
    for label, report in zip(labels(reports), reports, strict=True):
        if missing := [name for name in task_names(reports) if name not in report.tasks]:
            yield f"{label} was not run on {', '.join(missing)}."
    texts = {(report.blocks.text_hash, sum(report.blocks.tokens)) for report in reports if report.blocks is not None}
    if len(texts) > 1:
        yield "KL divergence and perplexity come from different texts."
