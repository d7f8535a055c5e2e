"""SVG drawings: axes that turn values into pixels, and elements that are always well-formed.

Every text is escaped where an element is made from it; what comes out is `Markup`, which the page's templates take as it is. Colours come from the page's style sheet through classes, so that one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from elmexport.evaluation.report.wording import printable

FONT = 12.0  # px; the size of every label, at the width the drawing is made for
_CHARACTER = 0.56 * FONT  # mean advance of the page's sans-serif face
_MARKERS = ("circle", "square", "triangle", "diamond", "cross")


def tag(name: str, /, *content: str, **attributes: str | float | None) -> Markup:
    """Build one element of escaped texts, and of other elements as they are.

    Attribute names lose a trailing `_` and turn `_` to `-`; None leaves an attribute out.
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items() if value is not None)
    inner = "".join(part if isinstance(part, Markup) else escape(printable(part)) for part in content)
    return Markup(f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>")


def _value(value: str | float) -> str:
    return escape(printable(value)) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def text_width(text: str) -> float:
    """Estimate how wide `text` is drawn, px."""
    return len(text) * _CHARACTER


def shorten(text: str, width: float) -> str:
    """Cut `text` in the middle where it is wider than `width` px: the ends of names tell them apart."""
    room = max(int(width / _CHARACTER), 3)
    if len(text) <= room:
        return text
    head = room // 2
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}"


@dataclass(frozen=True)
class Axis:
    """Scale from the values `low` to `high` onto the pixels `start` to `end`. On a logarithmic one, what is not positive lies at `start`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log and value <= 0:
            return self.start
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Choose about `count` round values within the axis."""
        if self.log:
            return self._log_ticks(count)
        step = _round_step((self.high - self.low) / max(count, 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            ticks = [d * 10.0**e for e in decades for d in digits if self.low * (1 - 1e-9) <= d * 10.0**e <= self.high * (1 + 1e-9)]
            if len(ticks) <= count:
                return ticks
        return ticks[:: math.ceil(len(ticks) / max(count, 1))]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= step * (1 - 1e-9))


def fit(values: Iterable[float], start: float, end: float, *, log: bool | None = None, include: Sequence[float] = ()) -> Axis:
    """Fit an axis to `values`, with a little room, and to `include`.

    Args:
        log: whether logarithmic; None decides: where none is negative and the positive ones range over more than a factor of 20.
    """
    shown = [*values, *include]
    low, high = min(shown), max(shown)
    positive = min((value for value in shown if value > 0), default=high)
    if log is None:
        log = low >= 0 and positive > 0 and high / positive > 20
    if log:
        room = (high / positive) ** 0.06
        return Axis(positive / room ** (3 if low == 0 else 1), high * room, start, end, log=True)
    room = (high - low) * 0.06 or abs(high) * 0.5 or 1.0
    bottom = 0.0 if low == 0 or (low > 0 and low < 0.4 * high) else low - room
    return Axis(bottom, 0.0 if high == 0 and low < 0 else high + room, start, end)


@dataclass
class Drawing:
    """Drawing of `width` by `height` px: elements in the order they are painted."""

    width: float
    height: float
    parts: list[Markup] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str) -> None:
        self.parts.append(tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_))

    def polyline(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        self.parts.append(tag("polyline", points=" ".join(f"{x:.2f},{y:.2f}" for x, y in points), class_=class_))

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", class_: str | None = None) -> None:
        """Add `text` with its baseline at `y`."""
        self.parts.append(tag("text", text, x=x, y=y, text_anchor=anchor, class_=class_))

    def marker(self, x: float, y: float, series: int, title: str, *, radius: float = 4.5) -> None:
        """Add the mark of a series, told from others by shape as well as colour; `title` shows when pointed at."""
        kind, class_ = _MARKERS[series % len(_MARKERS)], f"mark s{series % SERIES_COLOURS}"
        self.parts.append(tag("g", tag("title", title), _shape(kind, x, y, radius), class_=class_))

    def disc(self, x: float, y: float, text: str, title: str, class_: str) -> None:
        """Add a disc with a short `text` in it."""
        circle, label = tag("circle", cx=x, cy=y, r=10.0), tag("text", text, x=x, y=y + 4, text_anchor="middle")
        self.parts.append(tag("g", tag("title", title), circle, label, class_=class_))

    def tile(self, x: float, y: float, width: float, height: float, text: str, title: str, shade: float | None) -> None:
        """Add a rectangle with a `text` in it, in the shade of a value: 0 the lightest, 1 the darkest, None where there is no value."""
        opacity = None if shade is None else 0.08 + 0.92 * shade
        class_ = "cell blank" if shade is None else "cell dark" if shade > 0.55 else "cell"
        area = tag("rect", x=x, y=y, width=width, height=height, fill_opacity=opacity)
        label = tag("text", text, x=x + width / 2, y=y + height / 2 + 4, text_anchor="middle")
        self.parts.append(tag("g", tag("title", title), area, label, class_=class_))

    def render(self, label: str, class_: str) -> Markup:
        """Return the `<svg>` element; `label` is what a screen reader says instead."""
        return tag(
            "svg",
            *(Markup(f"\n{part}") for part in self.parts),
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            width=self.width,
            height=self.height,
            class_=class_,
            role="img",
            aria_label=label,
        )


SERIES_COLOURS = 6  # the style sheet's s0 to s5


def swatch(series: int) -> Markup:
    """Draw the mark of a series as a picture of its own, for legends."""
    mark = tag("g", _shape(_MARKERS[series % len(_MARKERS)], 7, 7, 5), class_=f"mark s{series % SERIES_COLOURS}")
    return tag("svg", mark, viewBox="0 0 14 14", width=14.0, height=14.0, class_="swatch", aria_hidden="true")


def _shape(kind: str, x: float, y: float, r: float) -> Markup:
    if kind == "circle":
        return tag("circle", cx=x, cy=y, r=r)
    if kind == "square":
        return tag("rect", x=x - 0.9 * r, y=y - 0.9 * r, width=1.8 * r, height=1.8 * r)
    if kind == "triangle":
        corners = [(0.0, -1.15), (1.1, 0.85), (-1.1, 0.85)]
    elif kind == "diamond":
        corners = [(0.0, -1.3), (1.1, 0.0), (0.0, 1.3), (-1.1, 0.0)]
    else:
        a, b = 0.4, 1.1
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    return tag("polygon", points=" ".join(f"{x + r * dx:.2f},{y + r * dy:.2f}" for dx, dy in corners))
