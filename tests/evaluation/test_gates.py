"""Limits, baselines, and JUnit XML as other programs read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import junitparser
import numpy as np
import pytest
from msgspec.structs import replace

from elmexport.errors import ElmExportError
from elmexport.evaluation.comparison import compare
from elmexport.evaluation.gates import GateFailure, Limits, check_gates, enforce
from elmexport.evaluation.junit import junit_xml, write_junit
from elmexport.evaluation.results import Blocks, ModelFacts, Report, TaskResult
from tests.evaluation.examples import example_evaluation, example_report, example_task


def report_on(ours: list[float], theirs: list[float]) -> Report:
    return compare(example_evaluation({"quiz": example_task(ours)}), example_evaluation({"quiz": example_task(theirs)}))


def answers(right: int, n: int = 100) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


@pytest.mark.parametrize(("limit", "passed"), [(2.0, True), (1.99, False), (0.0, False)])
def test_max_drop_is_held_against_the_measured_drop(limit: float, passed: bool) -> None:
    (gate,) = check_gates(report_on(answers(58), answers(60)), Limits(max_drop=limit)).gates
    assert (gate.name, gate.task, gate.limit, gate.passed) == ("max-drop", "quiz", limit, passed)
    assert gate.value == pytest.approx(2)


def test_reasons_say_what_noise_could_do() -> None:
    def reason(ours: int, limit: float, n: int = 100) -> str:
        return check_gates(report_on(answers(ours, n), answers(n * 6 // 10, n)), Limits(max_drop=limit)).gates[0].reason

    assert "quiz: acc got worse by 2.00 points, 1 allowed (100 items, 95 % interval" in reason(58, 1.0)
    assert "noise could explain it" in reason(58, 1.0)
    assert "beyond noise" in reason(30, 1.0)
    assert "a drop under 7.7 points may go unseen" in reason(60, 1.0)
    assert "unseen" not in reason(60, 10.0)
    assert "\n" not in reason(58, 1.0)


def test_a_gain_passes() -> None:
    (gate,) = check_gates(report_on(answers(70), answers(60)), Limits(max_drop=0)).gates
    assert gate.passed and "got better by 10.00 points" in gate.reason


def test_text_limits() -> None:
    report = example_report()
    gates = check_gates(report, Limits(max_kl=0.01, max_ppl_ratio=1.02)).gates
    assert [(gate.name, gate.passed, gate.value) for gate in gates] == [("max-kl", True, 0.01), ("max-ppl-ratio", False, 1.0238)]
    assert "perplexity is 1.0238 of the reference's, 1.02 allowed (510 tokens of bundled prose" in gates[1].reason


def test_perplexity_tasks_have_a_limit_too() -> None:
    report = report_on([1.0], [1.0])
    comparison = replace(report.tasks["quiz"].comparison, ratio=1.2, ratio_ci=(1.1, 1.3))  # type: ignore[type-var]
    report = replace(report, tasks={"wikitext": replace(report.tasks["quiz"], comparison=comparison)})
    (gate,) = check_gates(report, Limits(max_ppl_ratio=1.1)).gates
    assert gate.task == "wikitext" and not gate.passed


def test_enforce() -> None:
    report = check_gates(report_on(answers(58), answers(60)), Limits(max_drop=1.0))
    with pytest.raises(
        GateFailure, match=r"^1 of 1 gates failed for OpenELM-tiny-onnx-int4: quiz: acc got worse by 2\.00 points"
    ) as failure:
        enforce(report)
    assert failure.value.exit_code == 1 and "\n" not in str(failure.value)
    enforce(check_gates(report, Limits(max_drop=2.0)))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_drop=float("nan")), "--max-drop is nan"),
        (Limits(max_kl=-1), "--max-kl is -1; give a finite number from 0 up"),
        (Limits(max_kl=0.1), "--max-kl needs the text pass"),
        (Limits(max_ppl_ratio=1.1), "--max-ppl-ratio needs"),
    ],
)
def test_limits_that_cannot_be_held(limits: Limits, message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        check_gates(report_on([1.0], [1.0]), limits)


def test_max_drop_needs_a_reference() -> None:
    with pytest.raises(ElmExportError, match="--max-drop needs a task with a reference"):
        check_gates(compare(example_evaluation({"quiz": example_task([1.0])}), None), Limits(max_drop=1))


def against(now: Mapping[str, TaskResult], then: Mapping[str, TaskResult]) -> list[tuple[bool, str]]:
    report, baseline = (compare(example_evaluation(tasks), None) for tasks in (now, then))
    return [(gate.passed, gate.reason) for gate in check_gates(report, Limits(), baseline).gates]


def test_baseline_of_the_same_items() -> None:
    same = {"quiz": example_task(answers(60))}
    assert against(same, same) == [(True, "quiz: acc did not change from the baseline, within noise (100 items paired)")]
    # One flip is noise; twelve, all in one direction, are not.
    assert against({"quiz": example_task(answers(59))}, same)[0][0]
    ((passed, reason),) = against({"quiz": example_task(answers(48))}, same)
    assert not passed and reason == "quiz: acc got worse by 12.00 points from the baseline, beyond noise (100 items paired)"
    assert against(same, {"quiz": example_task(answers(48))})[0][0]


def test_baseline_with_more_items_pairs_those_in_common() -> None:
    assert "60 items paired" in against({"quiz": example_task(answers(40, 60))}, {"quiz": example_task(answers(60))})[0][1]


def test_baseline_of_other_items_is_unpaired_and_says_so() -> None:
    (passed, reason), *_ = against({"quiz": example_task(answers(50), first=1000)}, {"quiz": example_task(answers(60))})
    assert passed and "no items in common with the baseline, so unpaired: 100 against 100" in reason
    assert not against({"quiz": example_task(answers(30), first=1000)}, {"quiz": example_task(answers(60))})[0][0]
    worse, better = (example_task(answers(right), first=first, higher_is_better=False) for right, first in ((60, 1000), (30, 0)))
    assert not against({"quiz": worse}, {"quiz": better})[0][0]
    assert against({"quiz": better}, {"quiz": worse})[0][0]


def test_many_tasks_do_not_make_false_alarms() -> None:
    """Six items lost and none won: significant alone, not among ten tasks."""
    now, then = example_task(answers(54)), example_task(answers(60))
    assert not against({"quiz": now}, {"quiz": then})[0][0]
    others = {f"other{i}": then for i in range(9)}
    assert against({"quiz": now, **others}, {"quiz": then, **others})[0][0]


def with_text(kl: float, nll: float, *, seed: int = 0, text_hash: str = "a") -> Report:
    report = replace(example_report(), tasks={})
    generator = np.random.default_rng(seed)
    tokens = np.full(40, 32)
    kls, nlls = kl * 32 * generator.uniform(0.5, 1.5, 40), nll * 32 * generator.uniform(0.9, 1.1, 40)
    mean = float(kls.sum() / tokens.sum())
    assert report.kl is not None and report.perplexity is not None
    return replace(
        report,
        kl=replace(report.kl, mean=mean, mean_ci=(0.9 * mean, 1.1 * mean)),
        perplexity=replace(report.perplexity, value=float(np.exp(nlls.sum() / tokens.sum()))),
        blocks=Blocks(text_hash, tuple(tokens.tolist()), tuple(nlls.tolist()), tuple(nlls.tolist()), tuple(kls.tolist())),
    )


def text_verdicts(now: Report, then: Report) -> list[tuple[bool, str]]:
    return [(gate.passed, gate.reason) for gate in check_gates(now, Limits(), then).gates]


def test_baseline_of_the_same_text() -> None:
    then = with_text(0.010, 3.0)
    kl, perplexity = text_verdicts(with_text(0.012, 3.02), then)
    assert not kl[0] and "mean KL divergence went from" in kl[1] and "beyond noise (paired, the same text)" in kl[1]
    assert not perplexity[0]
    # Always a little more, so beyond noise, but too little to matter.
    kl, perplexity = text_verdicts(with_text(0.0101, 3.0001), then)
    assert kl[0] and "too little to matter" in kl[1] and perplexity[0]
    # More on average, but as likely chance.
    assert text_verdicts(with_text(0.0102, 3.0, seed=1), then)[0][0]
    assert all(passed for passed, _ in text_verdicts(with_text(0.005, 2.9), then))


def test_baseline_of_another_text() -> None:
    then = with_text(0.010, 3.0, text_hash="b")
    kl, perplexity = text_verdicts(with_text(0.0105, 3.5), then)
    assert kl[0] and "another text than the baseline's, so unpaired" in kl[1]
    assert perplexity[0] and "times the reference's" in perplexity[1]
    assert not text_verdicts(with_text(0.02, 3.5), then)[0][0]
    assert then.perplexity is not None
    without = replace(then, perplexity=replace(then.perplexity, ratio=None, ratio_ci=None))
    with pytest.raises(ElmExportError, match="use the baseline's --text"):
        text_verdicts(with_text(0.01, 3.0), without)


def test_baselines_that_do_not_fit() -> None:
    report, example = report_on(answers(5), answers(6)), example_report()
    other = replace(report, artifact=replace(report.artifact, model=ModelFacts("other", "f" * 64)))
    with pytest.raises(ElmExportError, match="the baseline is of other"):
        check_gates(report, Limits(), other)
    with pytest.raises(ElmExportError, match="the baseline has arc_easy, kl, perplexity, this evaluation does not"):
        check_gates(report, Limits(), example)
    assert example.reference is not None
    with pytest.raises(ElmExportError, match="use the same --against"):
        check_gates(example, Limits(), replace(example, reference=replace(example.reference, quant="int8")))
    quiz = {"quiz": example_task(answers(5), fewshot=5)}
    with pytest.raises(ElmExportError, match="with 5 few-shot examples, this evaluation acc with 0"):
        check_gates(report, Limits(), compare(example_evaluation(quiz), None))


def test_junit_is_read_by_a_junit_reader(tmp_path: Path) -> None:
    report = check_gates(example_report(), Limits(max_drop=1.0, max_kl=0.5))
    write_junit(report, tmp_path / "junit.xml")
    (suite,) = junitparser.JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (3, 1, 0, 0)
    assert suite.time == pytest.approx(report.seconds)
    evaluation, drop, kl = list(suite)
    assert (evaluation.name, drop.name, kl.name) == ("evaluation", "max-drop arc_easy", "max-kl")
    assert evaluation.is_passed and kl.is_passed and not drop.is_passed
    assert drop.result[0].message == report.gates[0].reason and drop.result[0].type == "max-drop"
    assert "arc_easy: acc_norm 0.5, 4 items, drop 50.00 points" in evaluation.system_out


# The shape that Jenkins' and the Apache Ant schema have in common: https://github.com/jenkinsci/xunit-plugin (junit-10.xsd).
ALLOWED: Mapping[str, tuple[set[str], set[str]]] = {
    "testsuites": ({"name", "time", "tests", "failures", "errors", "skipped", "disabled"}, {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname", "id"}, {"testcase", "properties"}),
    "testcase": ({"name", "classname", "time", "status", "assertions"}, {"failure", "error", "skipped", "system-out", "system-err"}),
    "failure": ({"message", "type"}, set()),
    "system-out": (set(), set()),
}


def test_junit_has_the_common_shape_and_no_character_that_xml_forbids() -> None:
    report = check_gates(example_report(), Limits(max_drop=1.0, max_kl=0.5))
    label = "na\x00me <&> \ud800"
    text = junit_xml(replace(report, artifact=replace(report.artifact, label=label)))
    root = ElementTree.fromstring(text.encode("utf-8"))
    for element in root.iter():
        attributes, children = ALLOWED[element.tag]
        assert set(element.attrib) <= attributes and {child.tag for child in element} <= children
    assert root[0].attrib["name"] == "elmexport.na�me <&> �"


def test_the_gates_get_into_the_document() -> None:
    document: Any = json.loads(check_gates(example_report(), Limits(max_drop=1.0)).to_json())
    assert document["gates"][0]["passed"] is False and document["gates"][0]["limit"] == 1.0
