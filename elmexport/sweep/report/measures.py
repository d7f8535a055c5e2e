"""Measures of what quantization cost, of the cells of a sweep: divergence on each text, drop on each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elmexport.evaluation.report.figures import NOISE
from elmexport.evaluation.report.overview import common_tasks, drop, mean_drop, task_names
from elmexport.evaluation.report.wording import number, points, tasks
from elmexport.sweep.results import CellResult, SweepResults


@dataclass(frozen=True)
class Measure:
    """One measure: its name and unit, the value of a cell (None where it has none), and how that is written."""

    name: str
    unit: str
    of: Callable[[CellResult], float | None]
    show: Callable[[float], str]
    warning: str = ""

    def values(self, cells: Sequence[CellResult]) -> list[float | None]:
        return [self.of(cell) for cell in cells]


def measures(results: SweepResults) -> list[Measure]:
    """All measures of a sweep: KL divergence on each text, the drop on each task, and where there are several tasks their mean."""
    texts = dict.fromkeys(name for cell in results.cells for name, text in cell.texts.items() if text.kl is not None)
    found = [_divergence(name) for name in texts]
    found += [_drop(name) for name in task_names(results.reports) if any(drop(report, name) is not None for report in results.reports)]
    common = common_tasks(results.reports)
    if len(common) > 1:
        found.append(_mean_drop(common))
    return found


def _divergence(text: str) -> Measure:
    def of(cell: CellResult) -> float | None:
        found = cell.texts.get(text)
        return None if found is None or found.kl is None else found.kl.mean

    return Measure(f"mean KL divergence on {text}", "nats per token", of, number)


def _drop(task: str) -> Measure:
    return Measure(
        f"drop on {task}", "percentage points", lambda cell: None if cell.report is None else drop(cell.report, task), points, NOISE
    )


def _mean_drop(common: Sequence[str]) -> Measure:
    def of(cell: CellResult) -> float | None:
        return None if cell.report is None else mean_drop(cell.report, common)

    return Measure(f"mean drop over {tasks(len(common))}", "percentage points", of, points, NOISE)
