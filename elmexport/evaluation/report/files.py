"""Reading and writing of report files, in the form that the suffix names."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from elmexport.documents import decode_json
from elmexport.errors import ElmExportError
from elmexport.evaluation.completions import SideBySide
from elmexport.evaluation.report.html import html
from elmexport.evaluation.report.markdown import markdown
from elmexport.evaluation.results import SCHEMA, Report, read_report
from elmexport.files import check_writable, write_text


def to_json(reports: Sequence[Report]) -> str:
    """Serialize reports as JSON: one report's document; of several, `{"schema": …, "reports": [document, …]}`. Ends with a newline.

    Raises:
        ElmExportError: a figure that is not finite.
    """
    if len(reports) == 1:
        return reports[0].to_json() + "\n"
    return json.dumps({"schema": SCHEMA, "reports": [json.loads(report.to_json()) for report in reports]}, ensure_ascii=False) + "\n"


def read_reports(path: Path) -> list[Report]:
    """Read what `to_json` wrote: one report or several.

    Raises:
        ElmExportError: no such file, or no report in it.
    """
    try:
        document = decode_json(path.read_bytes())
    except (OSError, ValueError):
        return [read_report(path)]  # says what is wrong
    if not isinstance(document, dict) or not isinstance(document.get("reports"), list):
        return [read_report(path)]
    return [Report.from_json(json.dumps(entry), f"{path}, report {i}") for i, entry in enumerate(document["reports"], 1)]


_FORMS: Mapping[str, Callable[[Sequence[Report]], str]] = {".html": html, ".md": markdown, ".json": to_json}


def check_output(path: Path, forms: Collection[str] = tuple(_FORMS)) -> None:
    """Check the place of a report: refuse early what could not be written there. `forms` are the suffixes that it may have.

    Raises:
        ElmExportError: a suffix that names no form, a folder, or a place in a folder that is not there.
    """
    if path.suffix.lower() not in forms:
        found = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise ElmExportError(f"{path} has {found}, which names no form of a report; end it with {', '.join(forms)}")
    if path.is_dir():
        raise ElmExportError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ElmExportError(f"there is no folder {path.parent} to write {path.name} in; create it first")
    check_writable(path, "place")


def write_reports(reports: Sequence[Report], path: Path, said: SideBySide | None = None) -> None:
    """Write one report, or a comparison of several, whole or not at all. A file that is there is replaced. `said` is a section of a page.

    Raises:
        ElmExportError: see `check_output`; or the place cannot be written.
    """
    check_output(path)
    form = _FORMS[path.suffix.lower()]
    write_text(path, html(reports, said) if form is html else form(reports))
