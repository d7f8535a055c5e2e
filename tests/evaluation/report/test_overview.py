from __future__ import annotations

import msgspec
import pytest

from elmexport.evaluation.report.overview import common_tasks, differences, labels, mean_drop
from tests.evaluation.report import examples


def test_mean_drops_are_over_the_tasks_that_every_report_has() -> None:
    reports = [examples.report(tasks=["arc_easy", "boolq", "piqa"]), examples.report("b", 0.9, tasks=["piqa", "arc_easy"])]
    assert common_tasks(reports) == ["arc_easy", "piqa"]
    drops = [comparison.drop for name in ("arc_easy", "piqa") if (comparison := reports[0].tasks[name].comparison) is not None]
    assert mean_drop(reports[0], common_tasks(reports)) == pytest.approx(sum(d for d in drops if d is not None) / 2)


def test_without_a_reference_there_is_no_mean_drop() -> None:
    reports = [examples.report(tasks=["arc_easy"]), examples.report(tasks=["arc_easy"], reference=False)]
    assert common_tasks(reports) == []
    assert mean_drop(reports[0], []) is None


def test_labels_that_are_the_same_get_their_paths() -> None:
    one = examples.report(tasks=["boolq"])
    other = msgspec.structs.replace(one, artifact=msgspec.structs.replace(one.artifact, path="/elsewhere/OpenELM-270M-onnx-int4"))
    assert labels([one, other, examples.report("c", tasks=["boolq"])]) == [
        "OpenELM-270M-onnx-int4 (./OpenELM-270M-onnx-int4)",
        "OpenELM-270M-onnx-int4 (/elsewhere/OpenELM-270M-onnx-int4)",
        "c",
    ]


def test_reports_of_one_family_compare_directly() -> None:
    assert differences(examples.family()) == []


def test_differences_are_named() -> None:
    one = examples.report(tasks=["boolq"])
    assert one.blocks is not None and one.reference is not None
    texts = msgspec.structs.replace(one, blocks=msgspec.structs.replace(one.blocks, text_hash="other"))
    assert differences([one, texts]) == ["KL divergence and perplexity come from different texts."]
    model = msgspec.structs.replace(one.artifact.model, identity="other", name="OpenELM-450M")
    models = msgspec.structs.replace(one, artifact=msgspec.structs.replace(one.artifact, model=model))
    assert "2 different models (OpenELM-270M, OpenELM-450M)" in differences([one, models])[0]
    reference = msgspec.structs.replace(one, reference=msgspec.structs.replace(one.reference, identity="other"))
    assert differences([one, reference]) == ["The artifacts were not compared with the same reference."]
