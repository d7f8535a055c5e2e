"""Figures of a report: plots with their captions, legends, and the tables that say the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from elmexport.evaluation.report.overview import common_tasks, labels, mean_drop, task_names
from elmexport.evaluation.report.pareto import pareto_front
from elmexport.evaluation.report.plots import Interval, Line, Point, drop_plot, line_plot, size_plot
from elmexport.evaluation.report.table import Cell, Column, Table, number_column
from elmexport.evaluation.report.wording import megabytes, number, points, tasks
from elmexport.evaluation.results import Report, TaskResult

NOISE = " Drops are noisier than KL divergence: where they differ by less than their intervals, trust the plot of KL divergence."
WIDTHS = (("wide", 860.0), ("narrow", 350.0))


@dataclass(frozen=True)
class Figure:
    """A plot with what belongs to it.

    Args:
        drawings: the same plot for wide and for narrow pages; none where there is nothing finite to draw.
        legend: the series and its name.
        tables: the same figures as tables.
    """

    drawings: tuple[Markup, ...]
    caption: str
    legend: tuple[tuple[int, str], ...] = ()
    tables: tuple[Table, ...] = ()


def drop_figure(reports: Sequence[Report]) -> Figure | None:
    """Plot the drops on each task, with intervals; None where nothing was compared. The tables of the tasks hold its figures."""
    rows = []
    names = labels(reports)
    for task in task_names(reports):
        found = [interval for i, report in enumerate(reports) if (interval := _interval(i, names[i], report.tasks.get(task))) is not None]
        if found:
            rows.append((task, found))
    if not rows:
        return None
    limits = {gate.limit for report in reports for gate in report.gates if gate.name == "max-drop" and gate.limit is not None}
    limit = limits.pop() if len(limits) == 1 else None
    label = f"Plot of the drop on each of {len(rows)} tasks, in percentage points, with 95 % intervals. The tables of this section hold its figures."
    drawings = tuple(drop_plot(rows, width=width, limit=limit, label=label, class_=class_) for class_, width in WIDTHS)
    caption = "A mark is the drop that was measured; its bar is the 95 % interval. A bar that crosses 0 is within noise."
    if limit is not None:
        caption += f" The dashed line is the largest drop that the gate allows, {limit:g} points."
    return Figure(drawings, caption, _legend(names))


def _interval(series: int, label: str, task: TaskResult | None) -> Interval | None:
    if task is None or task.comparison is None or task.comparison.drop is None or not math.isfinite(task.comparison.drop):
        return None
    ends = task.comparison.drop_ci
    return Interval(series, label, task.comparison.drop, ends if ends is not None and all(map(math.isfinite, ends)) else None)


def _legend(names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    return tuple((i, f"{i + 1}. {name}") for i, name in enumerate(names)) if len(names) > 1 else ()


def depth_figures(reports: Sequence[Report]) -> list[Figure]:
    """Plot KL divergence against depth in the text: mean and 99 % in one plot for one report, in a plot each for several."""
    names = labels(reports)
    known = [(i, name, report) for i, (name, report) in enumerate(zip(names, reports, strict=True)) if report.kl and report.kl.by_depth]
    if not known:
        return []
    means = [Line(i, name, _by_depth(report, lambda b: b[0])) for i, name, report in known]
    tails = [Line(i, name, _by_depth(report, lambda b: b[1])) for i, name, report in known]
    tables = tuple(_depth_table(name, report) for _, name, report in known)
    where = "Depth: how many tokens of the text the model has read."
    if len(known) == 1:
        both = [Line(0, "mean", means[0].points), Line(1, "99 %", tails[0].points, dashed=True)]
        legend: tuple[tuple[int, str], ...] = ((0, "mean"), (1, "99 %"))
        return [_depth_figure(both, "KL divergence", f"{where} 99 %: 99 of 100 tokens are below.", legend, tables)]
    legend = tuple((i, f"{i + 1}. {name}") for i, name, _ in known)
    return [
        _depth_figure(means, "KL divergence, mean", where, legend, tables),
        _depth_figure(tails, "KL divergence, 99 %", "99 of 100 tokens are below.", legend, ()),
    ]


def _by_depth(report: Report, pick: Callable[[tuple[float, float]], float]) -> list[tuple[float, float]]:
    assert report.kl is not None
    found = [((bucket.start + bucket.end) / 2, pick((bucket.mean, bucket.p99))) for bucket in report.kl.by_depth if bucket.tokens]
    return [(x, y) for x, y in found if math.isfinite(y)]


def _depth_figure(lines: Sequence[Line], what: str, caption: str, legend: tuple[tuple[int, str], ...], tables: tuple[Table, ...]) -> Figure:
    drawn = [line for line in lines if line.points]
    if not drawn:
        return Figure((), f"{what}: no finite figures to draw.", (), tables)
    label = f"Plot of {what} in nats per token against depth in the text in tokens."
    drawings = tuple(
        line_plot(drawn, width=width, x_title="depth in the text, tokens", y_title=f"{what}, nats per token", label=label, class_=class_)
        for class_, width in WIDTHS
    )
    return Figure(drawings, caption, legend, tables)


def _depth_table(name: str, report: Report) -> Table:
    assert report.kl is not None
    rows = tuple(
        (Cell(f"{bucket.start:,} to {bucket.end - 1:,}"), Cell(number(bucket.mean)), Cell(number(bucket.p99)), Cell(f"{bucket.tokens:,}"))
        for bucket in report.kl.by_depth
    )
    columns = (
        Column("depth, tokens"),
        number_column("mean, nats per token"),
        number_column("99 %, nats per token"),
        number_column("tokens"),
    )
    return Table(f"KL divergence by depth, {name}", columns, rows)


@dataclass(frozen=True)
class Loss:
    """Measure of what quantization cost: one value for each report; `show` formats it, `warning` ends the caption."""

    what: str
    unit: str
    values: Sequence[float | None]
    show: Callable[[float], str]
    warning: str = ""


def size_figures(reports: Sequence[Report]) -> list[Figure]:
    """Plot size against KL divergence and against mean drop, for several artifacts whose sizes are known."""
    common = common_tasks(reports)
    kl = Loss("mean KL divergence", "nats per token", [None if report.kl is None else report.kl.mean for report in reports], number)
    drop = Loss(
        f"mean drop over {tasks(len(common))}",
        "percentage points",
        [mean_drop(report, common) for report in reports],
        points,
        NOISE,
    )
    names, sizes = labels(reports), [report.artifact.bytes for report in reports]
    return [drawn for loss in (kl, drop) if (drawn := size_figure(names, sizes, loss)) is not None]


def size_figure(names: Sequence[str], sizes: Sequence[int | None], loss: Loss, title: str = "") -> Figure | None:
    """Plot size (bytes) against `loss` of artifacts, the Pareto front marked; None for fewer than two that have both.

    `title` begins the caption.
    """
    discs = [
        Point(i, name, size / 1e6, value)
        for i, (name, size, value) in enumerate(zip(names, sizes, loss.values, strict=True), 1)
        if size is not None and value is not None and math.isfinite(value)
    ]
    if len(discs) < 2:
        return None
    front = [discs[i].number for i in pareto_front([(disc.x, disc.y) for disc in discs])]
    label = f"Plot of size in MB against {loss.what} in {loss.unit}. On the Pareto front: {', '.join(names[i - 1] for i in front)}."
    axes = {"x_title": "size of the artifact, MB", "y_title": f"{loss.what}, {loss.unit}"}
    drawings = tuple(size_plot(discs, width=width, **axes, label=label, class_=class_) for class_, width in WIDTHS)
    caption = f"{title}Filled and joined: the Pareto front, artifacts that no other beats in both size and quality. Down and to the left is better."
    if left_out := [name for i, name in enumerate(names, 1) if i not in {disc.number for disc in discs}]:
        caption += f" Not drawn, for want of finite figures: {', '.join(left_out)}."
    rows = tuple(
        (
            Cell(f"{i}. {name}"),
            Cell() if size is None else Cell(megabytes(size)),
            Cell() if value is None else Cell(loss.show(value)),
            Cell("yes" if i in front else "no"),
        )
        for i, (name, size, value) in enumerate(zip(names, sizes, loss.values, strict=True), 1)
    )
    columns = (Column("artifact"), number_column("MB"), number_column(f"{loss.what}, {loss.unit}"), Column("on the Pareto front"))
    return Figure(drawings, caption + loss.warning, (), (Table(f"Size against {loss.what}", columns, rows),))
