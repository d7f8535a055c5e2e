"""SVG plots of a report, drawn for a given width: drops with intervals, lines, size against loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from elmexport.evaluation.report.pareto import pareto_front
from elmexport.evaluation.report.svg import FONT, Axis, Drawing, fit, shorten, text_width
from elmexport.evaluation.report.wording import number, points

NARROW = 420.0  # px; below this, labels stand above what they name instead of beside it


@dataclass(frozen=True)
class Interval:
    """Value of one series with its interval (None: not known)."""

    series: int
    label: str
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Line:
    """Line of one series: points `(x, y)` by growing x."""

    series: int
    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """Artifact in a plot of size against loss, with the number that marks it."""

    number: int
    label: str
    x: float
    y: float


def drop_plot(rows: Sequence[tuple[str, Sequence[Interval]]], *, width: float, limit: float | None, label: str, class_: str) -> Markup:
    """Plot drops with their intervals, one band for each task, percentage points to the right of zero being a loss.

    Args:
        limit: the largest drop that a gate allows, drawn as a line.
    """
    narrow = width < NARROW
    left = 12.0 if narrow else min(max(text_width(name) for name, _ in rows) + 16, 0.32 * width)
    above = FONT + 8 if narrow else 4.0
    step = 16.0
    heights = [above + step * max(len(intervals), 1) + 6 for _, intervals in rows]
    top, bottom = 12.0 if limit is None else 30.0, 46.0
    drawing = Drawing(width, top + sum(heights) + bottom)
    values = [v for _, intervals in rows for i in intervals for v in (i.value, *(i.interval or ()))]
    axis = fit(values, left, width - 14, log=False, include=[0.0] if limit is None else [0.0, limit])
    floor = drawing.height - bottom
    for tick in axis.ticks(5 if narrow else 9):
        if tick != 0:
            drawing.line(axis(tick), top, axis(tick), floor, "grid")
        drawing.text(axis(tick), floor + 17, _tick(tick), anchor="middle", class_="tick")
    drawing.line(axis(0), top, axis(0), floor, "zero")
    drawing.text((left + width - 14) / 2, drawing.height - 8, "drop, percentage points (right of 0: worse)", anchor="middle", class_="axis")
    if limit is not None:
        drawing.line(axis(limit), top - 6, axis(limit), floor, "limit")
        words = f"allowed: {limit:g}"
        half = text_width(words) / 2
        drawing.text(min(max(axis(limit), left + half), width - half - 4), top - 12, words, anchor="middle", class_="limit")
    y = top
    for (name, intervals), height in zip(rows, heights, strict=True):
        drawing.line(0, y, width, y, "band")
        if narrow:
            drawing.text(0, y + FONT + 3, shorten(name, width), class_="label")
        else:
            drawing.text(left - 10, y + height / 2 + 4, shorten(name, left - 12), anchor="end", class_="label")
        for i, entry in enumerate(intervals):
            at = y + above + step * (i + 0.5) + 1
            said = f"{name}, {entry.label}: {points(entry.value)} points"
            if entry.interval is not None:
                low, high = entry.interval
                said += f", interval {points(low)} to {points(high)}"
                drawing.line(axis(low), at, axis(high), at, f"whisker s{entry.series % 6}")
                for end in (low, high):
                    drawing.line(axis(end), at - 4, axis(end), at + 4, f"whisker s{entry.series % 6}")
            drawing.marker(axis(entry.value), at, entry.series, said)
        y += height
    return drawing.render(label, class_)


def line_plot(lines: Sequence[Line], *, width: float, x_title: str, y_title: str, label: str, class_: str) -> Markup:
    """Plot lines with a mark at each point; the y axis is logarithmic where the values range over a factor of 20."""
    height = 0.86 * width if width < NARROW else 300.0
    values = [y for line in lines for _, y in line.points]
    drawing, x_axis, y_axis = _frame(
        [x for line in lines for x, _ in line.points], values, width, height, x_title, y_title, log_x=False, log_y=None
    )
    for line in lines:
        places = [(x_axis(x), y_axis(y)) for x, y in line.points]
        drawing.polyline(places, f"line s{line.series % 6}" + (" dashed" if line.dashed else ""))
        for (x, y), (at, value) in zip(places, line.points, strict=True):
            drawing.marker(x, y, line.series, f"{line.label}: {number(value)} at {number(at)}", radius=4)
    return drawing.render(label, class_)


def size_plot(discs: Sequence[Point], *, width: float, x_title: str, y_title: str, label: str, class_: str) -> Markup:
    """Plot size against loss as numbered discs; those on the Pareto front are filled and joined."""
    height = width if width < NARROW else 340.0
    drawing, x_axis, y_axis = _frame([p.x for p in discs], [p.y for p in discs], width, height, x_title, y_title, log_x=None, log_y=None)
    front = pareto_front([(p.x, p.y) for p in discs])
    true = [(x_axis(p.x), y_axis(p.y)) for p in discs]
    places = _apart(true)
    drawing.polyline([true[i] for i in front], "front")
    for (x, y), (a, b) in zip(true, places, strict=True):
        if (x, y) != (a, b):
            drawing.line(x, y, a, b, "leader")
    for i, (point, (x, y)) in enumerate(zip(discs, places, strict=True)):
        best = i in front
        said = f"{point.label}: {number(point.x)} {x_title}, {number(point.y)} {y_title}" + (", on the Pareto front" if best else "")
        drawing.disc(x, y, str(point.number), said, "disc best" if best else "disc")
    return drawing.render(label, class_)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    show: Callable[[float], str],
    width: float,
    label: str,
    class_: str,
) -> Markup:
    """Draw values by row and column as tiles, darker where they are larger; on a logarithmic scale where they range widely."""
    step, top = 24.0, FONT + 16
    left = min(max(map(text_width, rows)) + 14, 0.5 * width)
    room = min((width - left) / len(columns), 150.0)
    drawing = Drawing(width, top + step * len(rows) + 4)
    known = [value for line in values for value in line if value is not None]
    scale = fit(known, 0.0, 1.0) if known else None
    for place, column in enumerate(columns):
        drawing.text(left + room * (place + 0.5), FONT + 2, shorten(column, room - 4), anchor="middle", class_="axis")
    for at, (row, line) in enumerate(zip(rows, values, strict=True)):
        y = top + step * at
        drawing.text(left - 8, y + step / 2 + 4, shorten(row, left - 8), anchor="end", class_="label")
        for place, (column, value) in enumerate(zip(columns, line, strict=True)):
            said = f"{row}, {column}: {'not measured' if value is None else show(value)}"
            shade = None if value is None or scale is None else min(max(scale(value), 0.0), 1.0)
            drawing.tile(left + room * place, y, room, step, "" if value is None else show(value), said, shade)
    return drawing.render(label, class_)


def _frame(
    xs: Sequence[float],
    ys: Sequence[float],
    width: float,
    height: float,
    x_title: str,
    y_title: str,
    *,
    log_x: bool | None,
    log_y: bool | None,
) -> tuple[Drawing, Axis, Axis]:
    """An empty plot with grid, tick labels and axis titles; the y title stands above the axis, where it need not be turned."""
    top, bottom, right = 34.0, 50.0, 16.0
    drawing = Drawing(width, height)
    y_axis = fit(ys, height - bottom, top, log=log_y)
    y_ticks = y_axis.ticks(6)
    left = max(text_width(_tick(tick)) for tick in y_ticks) + 14
    x_axis = fit(xs, left, width - right, log=log_x)
    zero = y_axis.log and min(ys) == 0
    drawing.text(0, 16, y_title + (" (log scale, 0 at the bottom)" if zero else " (log scale)" if y_axis.log else ""), class_="axis")
    for tick in y_ticks:
        drawing.line(left, y_axis(tick), width - right, y_axis(tick), "grid")
        drawing.text(left - 6, y_axis(tick) + 4, _tick(tick), anchor="end", class_="tick")
    for tick in x_axis.ticks(4 if width < NARROW else 8):
        drawing.line(x_axis(tick), height - bottom, x_axis(tick), height - bottom + 5, "zero")
        drawing.text(x_axis(tick), height - bottom + 23, _tick(tick), anchor="middle", class_="tick")
    drawing.line(left, height - bottom, width - right, height - bottom, "zero")
    x_words = x_title + (" (log scale)" if x_axis.log else "")
    drawing.text((left + width - right) / 2, height - 6, x_words, anchor="middle", class_="axis")
    return drawing, x_axis, y_axis


def _apart(places: Sequence[tuple[float, float]], distance: float = 20.0) -> list[tuple[float, float]]:
    """`places`, those moved to the right that would lie on one that came before."""
    moved: list[tuple[float, float]] = []
    for x, y in places:
        free = x
        while any(math.hypot(free - a, y - b) < distance for a, b in moved):
            free += 2.0
        moved.append((free, y))
    return moved


def _tick(value: float) -> str:
    """A round number without trailing zeros."""
    text, e, exponent = number(value).partition("e")
    return (text.rstrip("0").rstrip(".") if "." in text else text) + e + exponent
