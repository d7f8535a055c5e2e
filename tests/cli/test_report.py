from __future__ import annotations

import json
from pathlib import Path

import pytest

from elmexport.evaluation.report.files import read_reports, write_reports
from tests.cli.conftest import Run
from tests.conftest import SmallArtifact
from tests.evaluation.report import examples


@pytest.fixture
def stored(tmp_path: Path) -> list[Path]:
    """Two reports in the current folder."""
    paths = [tmp_path / "int4.json", tmp_path / "int8.json"]
    for path, quant in zip(paths, ("int4", "int8"), strict=True):
        write_reports([examples.report(f"model-{quant}", quant=quant, tasks=["arc_easy"])], path)
    return paths


def test_stored_reports_are_compared_and_written_in_every_form(run: Run, stored: list[Path], tmp_path: Path) -> None:
    done = run("report", *stored, "--out", "all.html", "--out", "all.md", "--out", "all.json")
    assert done.code == 0
    assert "2 artifacts compared" in done.out and "model-int8" in done.out
    assert done.err.splitlines() == ["wrote all.html", "wrote all.md", "wrote all.json"]
    assert "<h1>2 artifacts compared</h1>" in (tmp_path / "all.html").read_text(encoding="utf-8")
    assert [report.artifact.label for report in read_reports(tmp_path / "all.json")] == ["model-int4", "model-int8"]
    again = run("report", "all.json", "--out", "all.html")
    assert again.err.splitlines() == ["replaced all.html"]


def test_json_is_one_document_on_stdout(run: Run, stored: list[Path]) -> None:
    done = run("report", *stored, "--json", "--out", "all.md")
    assert [entry["artifact"]["label"] for entry in json.loads(done.out)["reports"]] == ["model-int4", "model-int8"]
    assert json.loads(run("report", stored[0], "--json").out)["artifact"]["label"] == "model-int4"


def test_an_artifact_is_evaluated_beside_stored_reports(
    run: Run, stored: list[Path], small_artifact: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))
    artifact = small_artifact("onnx", "int8")
    done = run("report", stored[0], artifact, "--tasks", "none", "--text-tokens", 128, "--against", "none", "--json")
    assert done.code == 0, done
    first, second = json.loads(done.out)["reports"]
    assert (first["artifact"]["label"], second["artifact"]["label"]) == ("model-int4", artifact.name)
    assert second["perplexity"]["value"] > 1 and second["reference"] is None


def test_what_cannot_be_written_is_refused_before_anything_is_read(run: Run) -> None:
    run("report", "gone.json", "--out", "report.pdf").refused("report.pdf has suffix '.pdf'", ".html, .md, .json")
    run("report", "gone.json", "--out", "nowhere/report.md").refused("there is no folder nowhere")


def test_options_that_would_do_nothing_are_refused(run: Run, stored: list[Path]) -> None:
    run("report", *stored, "--limit", 5).refused("--limit changes nothing")
    run("report", *stored, "--against", "fp16").refused("--against changes nothing")


def test_sources_that_are_nothing_are_refused(run: Run, tmp_path: Path) -> None:
    run("report", "gone.json").refused("cannot read gone.json")
    run("report", "gone").refused("gone")
    (tmp_path / "other.json").write_text("{}")
    run("report", "other.json").refused("other.json is JSON, but no report")
