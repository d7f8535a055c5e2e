"""Reports as text for a terminal of 80 columns, or for a pipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from elmexport.evaluation.report.contents import Contents, contents_of
from elmexport.evaluation.report.table import Cell, Column, Kind, Table, Tone
from elmexport.evaluation.report.wording import MINUS, printable
from elmexport.evaluation.results import Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

_UNLIMITED = 10_000  # columns: nobody looks at the width of a pipe, and a cut line is hard to search
_STYLES = {None: "", Tone.BAD: "red", Tone.GOOD: "green"}


def print_reports(reports: Sequence[Report], console: Console | None = None) -> None:
    """Print one report, or a comparison of several, on `console` (stdout where None)."""
    print_contents(contents_of(reports), console)


def print_contents(contents: Contents, console: Console | None = None) -> None:
    """Print the contents of a report on `console` (stdout where None).

    Piped text has no colour and no wrapped lines; where NO_COLOR is set, a terminal gets no escape codes either.
    """
    from rich.console import Console

    out = Console(highlight=False) if console is None else console
    if not out.is_terminal:
        out = Console(file=out.file, width=_UNLIMITED, color_system=None, highlight=False)
    elif os.environ.get("NO_COLOR"):  # rich leaves out colours, and keeps bold
        out = Console(file=out.file, width=out.width, color_system=None, highlight=False)
    with out.capture() as printed:  # written here: rich answers a closed pipe by ending the process with code 1
        _print_contents(out, contents)
    out.file.write(printed.get())
    out.file.flush()


def _print_contents(out: Console, contents: Contents) -> None:
    _say(out, contents.title)
    _say(out, contents.facts)
    for table in (contents.artifacts, contents.tasks, contents.text):
        if table is not None:
            _print_table(out, table)
    if contents.gates is not None:
        _print_gates(out, contents.gates)
    noted = [*contents.differences, *(f"{note}." for note in contents.notes)]
    if noted:
        _say(out, "")
    for note in noted:
        _say(out, f"note: {note}")
    said = ([] if contents.verdict is None else [contents.verdict.text]) + list(contents.findings)
    if said:
        _say(out, f"\n{' '.join(said)}")


def _print_table(out: Console, table: Table) -> None:
    """Print labels and numbers as a table, qualifiers as lines below it, sentences as tables of their own: 80 columns do not hold them all."""
    beside = [i for i, column in enumerate(table.columns) if column.kind in (Kind.LABEL, Kind.NUMBER)]
    _print_columns(out, table, beside)
    below = [_grouped(table, i) for i, column in enumerate(table.columns) if column.kind is Kind.QUALIFIER]
    below += table.notes
    below += [f"* {table.marked}."] if table.marked else []
    if below:
        _say(out, "\n" + "\n".join(below))
    for i, column in enumerate(table.columns):
        if column.kind is Kind.SENTENCE:
            _print_columns(out, table, [0, i])


def _grouped(table: Table, column: int) -> str:
    """The names of the rows by what a column says of them."""
    groups: dict[str, list[str]] = {}
    for row in table.rows:
        groups.setdefault(row[column].text, []).append(row[0].text)
    return "; ".join(f"{text}: {', '.join(names)}" for text, names in groups.items())


def _print_columns(out: Console, table: Table, shown: Sequence[int]) -> None:
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for i in shown:
        _add_column(drawn, table.columns[i])
    marked = [any(_is_marked(table.columns[i], row[i]) for row in table.rows) for i in range(len(table.columns))]
    for row in table.rows:
        said = [cell.tone for column, cell in zip(table.columns, row, strict=True) if column.kind is Kind.SENTENCE]
        style = next((_STYLES[tone] for tone in said), "")
        drawn.add_row(*(_cell(table.columns[i], row[i], marked[i]) for i in shown), style=style)
    if out.measure(drawn, options=out.options.update(max_width=_UNLIMITED)).maximum > out.width:
        drawn.padding = (0, 0, 0, 0)  # one space between columns instead of two
    out.print()
    out.print(drawn)


def _add_column(drawn: RichTable, column: Column) -> None:
    if column.right:
        drawn.add_column(column.short or column.name, justify="right", no_wrap=True)
    else:
        drawn.add_column(column.short or column.name, overflow="fold")


def _is_marked(column: Column, cell: Cell) -> bool:
    return column.kind is Kind.NUMBER and cell.tone is not None


def _cell(column: Column, cell: Cell, marked: bool) -> Text:
    """A cell, with room for the mark where any cell of the column has it."""
    mark = "*" if _is_marked(column, cell) else " "
    return _plain(cell.text + (mark if marked else ""), _STYLES[cell.tone])


def _print_gates(out: Console, table: Table) -> None:
    """Print a line for each gate, of several artifacts below their names."""
    before: str | None = None
    for *artifact, outcome, gate, reason in table.rows:
        name = artifact[0].text if artifact else ""
        if name != before:
            _say(out, f"\n{name}" if name else "")
        before = name
        failed = outcome.tone is Tone.BAD
        _say(out, f"{outcome.text.upper() if failed else outcome.text}  {gate.text}: {reason.text}", "bold red" if failed else "")


def _say(out: Console, text: str, style: str = "") -> None:
    out.print(_plain(text, style))


def _plain(text: str, style: str = "") -> Text:
    """`text` in characters that any terminal's encoding has, in which no square bracket is markup and nothing steers the terminal."""
    from rich.text import Text

    text = printable(text)
    for character, plain in ((MINUS, "-"), ("×", "x"), ("∞", "inf"), ("\ufffd", "?")):
        text = text.replace(character, plain)
    return Text(text, style)
