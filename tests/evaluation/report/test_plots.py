"""What is drawn stands where its value says."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elmexport.evaluation.report.plots import Interval, Line, Point, drop_plot, line_plot, size_plot
from elmexport.evaluation.report.svg import fit, shorten

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3))


@given(st.lists(finite, min_size=1, max_size=20), st.sampled_from([None, False]))
def test_an_axis_keeps_the_order_of_values_and_holds_them_all(values: list[float], log: bool | None) -> None:
    axis = fit(values, 40.0, 300.0, log=log)
    places = [axis(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(40.0 - 1e-6 <= place <= 300.0 + 1e-6 for place in places)


@given(st.floats(1e-6, 1e3), st.floats(30, 1e6), st.integers(3, 8))
def test_ticks_of_a_logarithmic_axis_lie_on_it(low: float, factor: float, count: int) -> None:
    axis = fit([low, low * factor], 0.0, 100.0)
    assert axis.log
    assert all(-1e-6 <= axis(tick) <= 100.0 + 1e-6 for tick in axis.ticks(count))
    assert 1 <= len(axis.ticks(count)) <= count
    assert axis(low * math.sqrt(factor)) == pytest.approx(50.0)  # the geometric mean is in the middle


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5), st.integers(2, 10))
def test_ticks_are_round_and_about_as_many_as_asked(low: float, span: float, count: int) -> None:
    axis = fit([low, low + span], 0.0, 100.0, log=False)
    ticks = axis.ticks(count)
    assert len(ticks) <= count + 1
    assert all(-1e-6 <= axis(tick) <= 100.0 + 1e-6 for tick in ticks)


def test_zero_lies_at_the_end_of_a_logarithmic_axis() -> None:
    axis = fit([0.0, 1e-4, 1.0], 0.0, 100.0)
    assert axis.log
    assert 0.0 == axis(0.0) < axis(1e-4) < axis(1.0) < 100.0


def test_drops_and_their_intervals_stand_at_their_values() -> None:
    drops = [-1.5, 0.0, 2.0, 7.25]
    rows = [(f"task{i}", [Interval(0, "a", drop, (drop - 1.0, drop + 2.0))]) for i, drop in enumerate(drops)]
    drawing = _parse(drop_plot(rows, width=760.0, limit=3.0, label="drops", class_="wide"))
    marks = [float(circle.get("cx", "nan")) for circle in drawing.iter("circle")]
    zero = next(float(line.get("x1", "nan")) for line in drawing.iter("line") if line.get("class") == "zero")
    limit = next(float(line.get("x1", "nan")) for line in drawing.iter("line") if line.get("class") == "limit")
    per_point = (limit - zero) / 3.0
    assert per_point > 0
    assert marks == pytest.approx([zero + drop * per_point for drop in drops], abs=0.05)
    bars = [line for line in drawing.iter("line") if "whisker" in line.get("class", "") and line.get("y1") == line.get("y2")]
    ends = [(float(bar.get("x1", "nan")), float(bar.get("x2", "nan"))) for bar in bars]
    expected = [(zero + (drop - 1.0) * per_point, zero + (drop + 2.0) * per_point) for drop in drops]
    assert [x for pair in ends for x in pair] == pytest.approx([x for pair in expected for x in pair], abs=0.05)


def test_a_line_falls_where_its_values_fall() -> None:
    line = Line(0, "mean", [(32.0, 0.5), (96.0, 0.2), (192.0, 0.01), (384.0, 0.3)])
    drawing = _parse(line_plot([line], width=760.0, x_title="depth, tokens", y_title="KL, nats", label="kl", class_="wide"))
    (points,) = [polyline.get("points", "") for polyline in drawing.iter("polyline")]
    places = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    by_height = sorted(range(4), key=lambda i: -places[i][1])  # y grows downwards
    assert by_height == sorted(range(4), key=lambda i: line.points[i][1])


def test_the_front_joins_true_places_even_where_discs_are_moved_apart() -> None:
    discs = [Point(1, "a", 100.0, 0.5), Point(2, "b", 100.0, 0.5), Point(3, "c", 200.0, 0.1), Point(4, "d", 220.0, 0.6)]
    drawing = _parse(size_plot(discs, width=760.0, x_title="size, MB", y_title="KL, nats", label="sizes", class_="wide"))
    centres = [(float(c.get("cx", "nan")), float(c.get("cy", "nan"))) for c in drawing.iter("circle")]
    assert all(math.dist(a, b) >= 19.9 for i, a in enumerate(centres) for b in centres[:i])
    (front,) = [polyline.get("points", "") for polyline in drawing.iter("polyline")]
    places = [tuple(map(float, pair.split(","))) for pair in front.split()]
    assert places == [centres[0], centres[0], centres[2]]
    filled = [group.get("class") for group in drawing.iter("g")]
    assert filled == ["disc best", "disc best", "disc best", "disc"]


@pytest.mark.parametrize("width", [350.0, 760.0])
def test_texts_stay_inside_of_the_drawing(width: float) -> None:
    rows = [("mmlu_high_school_government_and_politics", [Interval(0, "a", 12345.678, None)]), ("b", [Interval(0, "a", -0.001, None)])]
    drawing = _parse(drop_plot(rows, width=width, limit=None, label="drops", class_="wide"))
    for text in drawing.iter("text"):
        x, length = float(text.get("x", "nan")), 0.56 * 12 * len(text.text or "")
        start = {"start": x, "middle": x - length / 2, "end": x - length}[text.get("text-anchor", "start")]
        assert start >= -8 and start + length <= width + 14, text.text


def test_names_and_labels_are_escaped() -> None:
    rows = [('<b>&"task', [Interval(0, "</svg><script>", 1.0, None)])]
    drawing = _parse(drop_plot(rows, width=760.0, limit=None, label='a "label" <x>', class_="wide"))
    assert drawing.get("aria-label") == 'a "label" <x>'
    assert '<b>&"task' in [text.text for text in drawing.iter("text")]
    assert not list(drawing.iter("script"))


def test_a_long_name_is_cut_in_the_middle() -> None:
    assert re.fullmatch(r"mmlu_h\w*…\w*tics", shorten("mmlu_high_school_government_and_politics", 100))
    assert shorten("boolq", 100) == "boolq"


def _parse(svg: str) -> ET.Element:
    """The drawing; fails where it is not well-formed."""
    return ET.fromstring(svg)


def test_every_number_of_series_has_its_own_mark() -> None:
    def mark(series: int) -> tuple[Sequence[str], str | None]:
        plot = drop_plot([("t", [Interval(series, "a", 1.0, None)])], width=760.0, limit=None, label="l", class_="wide")
        (group,) = _parse(plot).iter("g")
        return [child.tag + (child.get("points", "")) for child in group if child.tag != "title"], group.get("class")

    assert len({str(mark(series)) for series in range(30)}) == 30
