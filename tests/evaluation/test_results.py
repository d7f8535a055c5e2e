"""The report document: it survives a round trip, fits its schema, and damaged ones are refused with the place named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from msgspec.structs import replace

from elmexport.errors import ElmExportError
from elmexport.evaluation.results import Report, read_report, write_report
from elmexport.evaluation.schema import report_schema
from tests.damage import places, spoilt
from tests.evaluation.examples import example_report


def bare_report() -> Report:
    """Nothing to compare with, no text pass."""
    report = example_report()
    task = replace(report.tasks["arc_easy"], comparison=None, published=None)
    return replace(report, reference=None, tasks={"arc_easy": task}, kl=None, perplexity=None, blocks=None, gates=(), lm_eval=None)


def test_schema_is_a_report_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(report_schema())


@pytest.mark.parametrize("report", [example_report(), bare_report()], ids=["full", "bare"])
def test_documents_fit_the_schema_and_survive_a_round_trip(report: Report, tmp_path: Path) -> None:
    document = json.loads(report.to_json())
    jsonschema.validate(document, report_schema())
    assert next(iter(document)) == "schema"
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_layout_is_the_documented_one() -> None:
    document = json.loads(example_report().to_json())
    task = document["tasks"]["arc_easy"]
    assert (task["acc"], task["acc_norm"], task["n"], task["drop"]) == (0.5, 0.5, 4, 50.0)
    assert task["flips"] == {"right_to_wrong": 2, "wrong_to_right": 0}
    assert task["reference"] == {"acc": 1.0, "acc_norm": 1.0}
    assert document["kl"]["by_depth"][0]["from"] == 0
    bare = json.loads(bare_report().to_json())["tasks"]["arc_easy"]
    assert bare["drop"] is bare["reference"] is bare["mcnemar_p"] is None


def _without(path: str) -> Any:
    document = json.loads(example_report().to_json())
    *parents, last = path.split(".")
    inner = document
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    del inner[last]
    return document


def _with(path: str, value: Any) -> Any:
    document = json.loads(example_report().to_json())
    *parents, last = path.split(".")
    inner = document
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (_without("schema"), "no report"),
        (_without("gates"), "report lacks gates"),
        (_without("tasks.arc_easy.items.2.hash"), r"report.tasks.arc_easy.items\[2\] lacks hash"),
        (_with("schema", 2), "report schema 2, this version reads up to 1; update elmexport"),
        (_with("kl.mean", "small"), "report.kl.mean is 'small', where a finite number belongs"),
        (_with("kl.tokens", 1.5), "report.kl.tokens is 1.5, where a whole number belongs"),
        (_with("kl.mean_ci", [1.0]), "report.kl.mean_ci has 1 entries, 2 belong there"),
        (_with("tasks.arc_easy.metric", "f1"), "metric is 'f1', but the task's metrics are acc, acc_norm"),
        (_with("tasks.arc_easy.drop", True), "drop is True, where a finite number or null belongs"),
        (_with("settings.limit", ["all"]), r"report.settings.limit is \['all'\], where a whole number or null belongs"),
        (_with("settings.notes", 7), "report.settings.notes is 7, where a list belongs"),
        (_with("tasks", []), r"report.tasks is \[\], where an object belongs"),
        ([1], "where an object belongs"),
    ],
)
def test_damaged_documents_are_refused(document: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ElmExportError, match=message) as error:
        read_report(path)
    assert str(path) in str(error.value)


def test_a_document_spoilt_anywhere_is_read_or_refused() -> None:
    document = json.loads(example_report().to_json())
    for place in places(document):
        for words, spoiled in spoilt(document, place):
            try:
                Report.from_json(json.dumps(spoiled), "r.json")
            except ElmExportError as error:
                assert str(error).startswith("r.json") and len(str(error)) < 250
            except Exception as error:
                pytest.fail(f"{place}, {words}: {error!r}")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ElmExportError, match=r"a\.json is not JSON"):
        read_report(tmp_path / "a.json")
    with pytest.raises(ElmExportError, match="not UTF-8"):
        read_report(tmp_path / "b.json")
    with pytest.raises(ElmExportError, match="No such file"):
        read_report(tmp_path / "c.json")
    with pytest.raises(ElmExportError, match="cannot write"):
        write_report(example_report(), tmp_path / "no folder" / "r.json")


def test_figures_that_are_not_finite_never_get_into_a_document() -> None:
    with pytest.raises(ElmExportError, match="not finite"):
        replace(example_report(), seconds=float("inf")).to_json()
