"""Pairing item by item: figures against scipy and statsmodels on the same vectors, and what must not be paired."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec.structs import replace
from statsmodels.stats.contingency_tables import mcnemar

from elmexport.errors import ElmExportError
from elmexport.evaluation.comparison import BOOTSTRAP, TANGO, UNPAIRED, compare, compare_task
from elmexport.evaluation.results import Flips, Item, TaskComparison, TaskResult
from elmexport.evaluation.statistics import detectable_drop, paired_interval
from tests.evaluation.examples import example_evaluation, example_task


def compared(task: TaskResult, reference: TaskResult) -> TaskComparison:
    comparison = compare_task("some_task", task, reference).comparison
    assert comparison is not None
    return comparison


def test_right_and_wrong_answers() -> None:
    ours, theirs = [1, 0, 0, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1, 0, 1, 1, 1]
    found = compared(example_task(ours), example_task(theirs))
    assert found.reference == {"acc": 0.8}
    assert found.drop == pytest.approx(20)
    assert found.flips == Flips(right_to_wrong=3, wrong_to_right=1)
    assert found.mcnemar_p == pytest.approx(mcnemar([[5, 3], [1, 1]], exact=True).pvalue)
    assert found.drop_ci == pytest.approx(tuple(100 * x for x in paired_interval(3, 1, 10)))
    assert found.detectable_drop == pytest.approx(100 * detectable_drop(3, 1, 10))
    assert found.ci_method == TANGO and found.ratio is None


def test_lower_may_be_better() -> None:
    found = compared(example_task([1, 1, 0], higher_is_better=False), example_task([1, 0, 0], higher_is_better=False))
    assert found.drop == pytest.approx(100 / 3)
    assert found.flips == Flips(1, 0)


def test_real_valued_metrics() -> None:
    generator = np.random.default_rng(0)
    theirs = generator.uniform(0, 1, 80)
    ours = np.clip(theirs - 0.05 + 0.1 * generator.standard_normal(80), 0, 1)
    found = compared(example_task(ours.tolist()), example_task(theirs.tolist()))
    drop = 100 * (theirs - ours).mean()
    half = 100 * 1.99 * (theirs - ours).std(ddof=1) / math.sqrt(80)
    assert found.drop == pytest.approx(drop)
    assert found.drop_ci == pytest.approx((drop - half, drop + half), abs=0.15 * half)
    assert found.ci_method == BOOTSTRAP and found.flips is None and found.mcnemar_p is None
    assert found.detectable_drop is not None and 0 < found.detectable_drop < 10


def test_perplexities_are_compared_by_their_ratio() -> None:
    def task(losses: list[float], words: list[int]) -> TaskResult:
        items = tuple(
            Item(i, f"h{i}", {"word_perplexity": math.exp(loss / count)}, (-loss,), "", (), None)
            for i, (loss, count) in enumerate(zip(losses, words, strict=True))
        )
        return TaskResult({"word_perplexity": math.exp(sum(losses) / sum(words))}, len(items), 0, "word_perplexity", False, {}, items)

    words = [100, 2000, 50, 700]
    losses = [300.0, 6500.0, 160.0, 2000.0]
    found = compared(task([loss + 0.02 * count for loss, count in zip(losses, words, strict=True)], words), task(losses, words))
    assert found.ratio == pytest.approx(math.exp(0.02))
    assert found.ratio_ci == pytest.approx((math.exp(0.02), math.exp(0.02)))
    assert found.drop is None and found.flips is None


def test_a_metric_that_is_no_mean_has_no_interval() -> None:
    ours, theirs = (replace(example_task([1, 0, 1]), metrics={"acc": value}) for value in (0.5, 0.75))
    found = compared(ours, theirs)
    assert found.drop == pytest.approx(25) and found.drop_ci is None and found.ci_method == UNPAIRED


def test_order_does_not_matter() -> None:
    ours, theirs = example_task([1, 0, 0]), example_task([1, 1, 0])
    assert compared(ours, replace(theirs, items=theirs.items[::-1])).flips == Flips(1, 0)


def test_items_keep_the_references_scores() -> None:
    result = compare_task("some_task", example_task([1, 0]), example_task([0, 1]))
    assert [item.reference.metrics["acc"] for item in result.items if item.reference] == [0, 1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (example_task([1, 1, 1], first=1), "some_task: item 0 is not among them"),
        (replace(example_task([1, 1, 1]), items=tuple(replace(i, hash="x") for i in example_task([1, 1, 1]).items)), "asks something else"),
        (example_task([1, 1, 1], metric="f1"), "some_task: item 0 has no acc"),
        (example_task([1, 1, 1], fewshot=5), "some_task: 0 few-shot examples, the reference has 5"),
    ],
)
def test_what_does_not_pair_is_refused(reference: TaskResult, message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        compare_task("some_task", example_task([1, 0, 1]), reference)


def test_a_report_of_two_evaluations() -> None:
    ours, theirs = (example_evaluation({"a": example_task(values)}, label) for values, label in (([1, 0], "ours"), ([1, 1], "theirs")))
    report = compare(ours, theirs, lm_eval="0.4.13")
    assert report.reference == theirs.artifact and report.kl is None and report.gates == () and report.passed
    assert report.tasks["a"].comparison is not None and report.tasks["a"].comparison.drop == 50
    assert compare(ours, None).tasks["a"].comparison is None
    with pytest.raises(ElmExportError, match="b: theirs has no results"):
        compare(example_evaluation({"b": example_task([1])}), theirs)
