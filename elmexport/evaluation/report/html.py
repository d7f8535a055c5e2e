"""Reports as one HTML page that needs nothing else: no network, no script library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from elmexport.evaluation.completions import SideBySide
from elmexport.evaluation.report.contents import Contents, contents_of
from elmexport.evaluation.report.figures import Figure, depth_figures, drop_figure, size_figures
from elmexport.evaluation.report.items import ShownItem, shown_items
from elmexport.evaluation.report.overview import labels
from elmexport.evaluation.report.svg import swatch
from elmexport.evaluation.report.table import Cell, Column, Kind, Table, Tone
from elmexport.evaluation.report.wording import printable
from elmexport.evaluation.results import Report

_PACKAGE = "elmexport.evaluation.report"
_ITEMS = 30  # shown of one report; fewer of each of several
_MARKS = {Kind.LABEL: {Tone.GOOD: "✓ ", Tone.BAD: "✗ "}, Kind.NUMBER: {Tone.GOOD: "▲ ", Tone.BAD: "▼ "}}
_CLASSES = {Kind.NUMBER: "num", Kind.SENTENCE: "words"}
_TONES = {Tone.GOOD: "good", Tone.BAD: "bad"}


def html(reports: Sequence[Report], said: SideBySide | None = None) -> str:
    """Render the page of one report, or of a comparison of several; `said` are completions of prompts to show."""
    return _template().render(
        contents=contents_of(reports),
        sizes=size_figures(reports) if len(reports) > 1 else [],
        drops=drop_figure(reports),
        depths=depth_figures(reports),
        items=_items(reports),
        said=said,
    )


def html_of(contents: Contents, figures: Sequence[Figure]) -> str:
    """Render the page of other contents than those of one evaluation, with `figures` of size and quality."""
    return _template().render(contents=contents, sizes=figures, drops=None, depths=[], items=[], said=None)


@cache
def _template() -> Template:
    """The template of the page. Everything is escaped but the elements of plots and the two files of our own."""
    environment = Environment(
        loader=PackageLoader(_PACKAGE, "templates"),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"unbroken": _unbroken, "explained": _explained, "heads": _heads, "rows": _rows, "mark": _mark, "tone": _tone}
    environment.globals |= {"swatch": swatch, "css": _resource("page.css"), "js": _resource("page.js")}
    return environment.get_template("page.html.jinja")


def _resource(name: str) -> Markup:
    return Markup((files(_PACKAGE) / "templates" / name).read_text(encoding="utf-8"))


def _printable(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _unbroken(words: str) -> str:
    """Words of our own, without line ends inside of `5 %` or `0-shot`."""
    return words.replace(" %", "\u00a0%").replace("-shot", "\u2011shot")


def _items(reports: Sequence[Report]) -> list[tuple[str, list[tuple[str, list[ShownItem]]]]]:
    """The worst items of each report that can have any, by task; empty where none was compared."""
    if not any(report.reference for report in reports):
        return []
    count = _ITEMS if len(reports) == 1 else max(5, _ITEMS // len(reports))
    return [(name, shown_items(report, count)) for name, report in zip(labels(reports), reports, strict=True)]


def _explained(table: Table) -> str:
    """The caption of a table with what explains its columns and marks."""
    marks = _MARKS[Kind.NUMBER]
    marked = f"{marks[Tone.BAD]}worse, {marks[Tone.GOOD]}better, {table.marked}." if table.marked else ""
    return " ".join(filter(None, (table.caption + ("." if table.notes or marked else ""), *table.notes, marked)))


@dataclass(frozen=True)
class _Placed:
    """A cell in its place, with its column, its class, and the qualifiers that stand below it."""

    column: Column
    cell: Cell
    class_: str
    below: tuple[Cell, ...]

    @property
    def value(self) -> str:
        """Sort key for the page's script; empty where that is the text."""
        return "" if self.cell.value is None else f"{self.cell.value:.10g}"


def _heads(table: Table) -> list[Column]:
    """The columns of a table but for its qualifiers, which stand below the names of the rows."""
    return [column for column in table.columns if column.kind is not Kind.QUALIFIER]


def _rows(table: Table) -> list[list[_Placed]]:
    rows = []
    for row in table.rows:
        cells = list(zip(table.columns, row, strict=True))
        below = tuple(cell for column, cell in cells if column.kind is Kind.QUALIFIER)
        shown = [(column, cell) for column, cell in cells if column.kind is not Kind.QUALIFIER]
        rows.append([_Placed(column, cell, _class(column, cell), () if i else below) for i, (column, cell) in enumerate(shown)])
    return rows


def _class(column: Column, cell: Cell) -> str:
    return " ".join(filter(None, (_CLASSES.get(column.kind, ""), _tone(cell))))


def _tone(cell: Cell) -> str:
    """The class of a cell's severity; empty where it has none."""
    return "" if cell.tone is None else _TONES[cell.tone]


def _mark(cell: Cell, kind: Kind = Kind.LABEL) -> str:
    """A sign before the text, so that severity is not said by colour alone; sentences say it themselves."""
    return "" if cell.tone is None else _MARKS.get(kind, {}).get(cell.tone, "")
