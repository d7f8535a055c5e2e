from __future__ import annotations

import math

import msgspec
import pytest

from elmexport.evaluation.report.wording import Finding, factor, number, points, reading, verdict
from elmexport.evaluation.results import Flips, TaskComparison, TaskResult
from tests.evaluation.report import examples


def compared(drop: float | None, ends: tuple[float, float] | None, **changes: object) -> TaskResult:
    base = examples.report(tasks=["arc_easy"]).tasks["arc_easy"]
    assert base.comparison is not None
    plain = msgspec.structs.replace(base.comparison, drop=drop, drop_ci=ends, flips=Flips(3, 2), detectable_drop=6.2)
    return msgspec.structs.replace(base, n=100, comparison=msgspec.structs.replace(plain, **changes))  # type: ignore[arg-type]


def test_noise_is_said_with_the_drop_that_so_many_items_cannot_show() -> None:
    found = reading(compared(1.0, (-3.0, 5.0)))
    assert found.finding is Finding.NOISE
    assert found.words == "within noise: 100 items cannot show a drop below 6.2 points"


@pytest.mark.parametrize(
    ("task", "finding"),
    [
        (compared(9.0, (2.0, 16.0)), Finding.WORSE),
        (compared(-9.0, (-16.0, -2.0)), Finding.BETTER),
        (compared(7.0, (-1.0, 15.0)), Finding.NOISE),  # more than 6.2, and yet not shown
        (compared(0.0, (-3.0, 3.0), flips=Flips(0, 0)), Finding.SAME),
        (compared(0.0, (-2.0, 2.0), flips=Flips(1, 1)), Finding.NOISE),
        (compared(None, None, ratio=1.2, ratio_ci=(1.1, 1.3)), Finding.WORSE),
        (compared(None, None, ratio=1.01, ratio_ci=(0.9, 1.1)), Finding.NOISE),
        (compared(None, None), Finding.UNKNOWN),
        (compared(3.0, None), Finding.UNKNOWN),
        (msgspec.structs.replace(compared(1.0, None), comparison=None), Finding.UNKNOWN),
    ],
)
def test_findings(task: TaskResult, finding: Finding) -> None:
    assert reading(task).finding is finding


def test_a_drop_that_could_have_been_seen_is_not_called_too_small() -> None:
    assert "cannot show" not in reading(compared(7.0, (-1.0, 15.0))).words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"),
        (0.0123456, "0.0123"),
        (1.0, "1.00"),
        (12345.6, "12,346"),
        (1.26e-7, "1.3e−7"),
        (-0.5, "−0.500"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers(value: float, words: str) -> None:
    assert number(value) == words


def test_points_have_no_negative_zero() -> None:
    assert points(-0.04) == "0.0"
    assert points(-0.06) == "−0.1"


def test_factors() -> None:
    assert factor(1.0123) == "×1.012"
    assert factor(15.0) == "×15.0"


def test_the_gates_in_one_sentence() -> None:
    good, bad = examples.gate("max-kl", 0.1, 0.01), examples.gate("max-drop", 1.0, 3.0, "arc_easy")
    assert verdict(examples.report(tasks=["arc_easy"])) == ""
    assert verdict(examples.report(tasks=["arc_easy"], gates=[good, good])) == "All 2 gates passed."
    assert verdict(examples.report(tasks=["arc_easy"], gates=[good, bad])) == "1 of 2 gates failed."


def test_every_field_of_a_comparison_is_known_here() -> None:
    """A new field is a new figure: show it, or say here why not."""
    names = set(TaskComparison.__struct_fields__)
    shown = {"reference", "drop", "drop_ci", "ci_method", "flips", "mcnemar_p", "detectable_drop", "ratio", "ratio_ci"}
    assert names == shown
