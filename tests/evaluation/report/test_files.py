from __future__ import annotations

import json
from pathlib import Path

import pytest

from elmexport.errors import ElmExportError
from elmexport.evaluation.report.files import check_output, read_reports, write_reports
from tests.evaluation.report import examples


@pytest.mark.parametrize("count", [1, 5])
def test_json_is_read_back_as_it_was(tmp_path: Path, count: int) -> None:
    reports = examples.family()[:count]
    write_reports(reports, tmp_path / "report.json")
    assert read_reports(tmp_path / "report.json") == reports


@pytest.mark.parametrize(
    ("name", "start"), [("r.html", "<!DOCTYPE html>"), ("r.HTML", "<!DOCTYPE html>"), ("r.md", "### OpenELM"), ("r.json", "{")]
)
def test_the_suffix_chooses_the_form(tmp_path: Path, name: str, start: str) -> None:
    write_reports([examples.report(tasks=["arc_easy"])], tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "r.md"
    out.write_text("before")
    write_reports([examples.report(tasks=["arc_easy"])], out)
    assert "before" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.pdf", r"suffix '\.pdf', which names no form of a report; end it with \.html, \.md, \.json"),
        ("report", "no suffix"),
        ("nowhere/report.html", "there is no folder"),
        ("folder.html", "is a folder"),
    ],
)
def test_other_places_are_refused_before_anything_is_done(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ElmExportError, match=message):
        check_output(tmp_path / name)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    (tmp_path / "r.md").touch()
    with pytest.raises(ElmExportError, match=r"cannot write .*r\.md: No space left on device"):
        write_reports([examples.report(tasks=["arc_easy"])], tmp_path / "r.md")
    assert [path.name for path in tmp_path.iterdir()] == ["r.md"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[]", "where an object belongs"),
        ("{}", "is JSON, but no report"),
        ('{"reports": [{}]}', "report 1 is JSON, but no report"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ElmExportError, match=message):
        read_reports(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"cannot read .*gone\.json"):
        read_reports(tmp_path / "gone.json")


def test_a_document_of_one_is_the_report_itself(tmp_path: Path) -> None:
    report = examples.report(tasks=["arc_easy"])
    write_reports([report], tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == json.loads(report.to_json())
