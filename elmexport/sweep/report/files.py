"""Files of a sweep's report, in the form that the suffix names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from elmexport.evaluation.report.files import check_output, to_json
from elmexport.evaluation.report.html import html_of
from elmexport.evaluation.report.markdown import markdown_of
from elmexport.files import write_text
from elmexport.sweep.report.contents import sweep_contents
from elmexport.sweep.report.csv import sweep_csv
from elmexport.sweep.report.figures import sweep_figures
from elmexport.sweep.results import SweepResults

FORMS: Mapping[str, Callable[[SweepResults], str]] = {
    ".html": lambda results: html_of(sweep_contents(results), sweep_figures(results)),
    ".md": lambda results: markdown_of(sweep_contents(results)),
    ".csv": sweep_csv,
    ".json": lambda results: to_json(results.reports),
}


def write_sweep(results: SweepResults, path: Path) -> None:
    """Write the report of a sweep, whole or not at all. A file that is there is replaced.

    Raises:
        ElmExportError: see `check_output`; or the place cannot be written.
    """
    check_output(path, FORMS)
    write_text(path, FORMS[path.suffix.lower()](results))
