"""Reports as GitHub-flavoured Markdown, short enough for a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from elmexport.evaluation.report.contents import Contents, contents_of
from elmexport.evaluation.report.table import Cell, Column, Kind, Table, Tone
from elmexport.evaluation.results import Report

_OUTCOMES = {Tone.GOOD: "✅ ", Tone.BAD: "❌ "}


def markdown(reports: Sequence[Report]) -> str:
    """Render one report, or a comparison of several, as Markdown; ends with a newline."""
    return markdown_of(contents_of(reports))


def markdown_of(contents: Contents) -> str:
    """Render the contents of a report as Markdown; ends with a newline."""
    verdict = contents.verdict
    mark = "" if verdict is None or verdict.tone is None else _OUTCOMES[verdict.tone]
    said = ([] if verdict is None else [verdict.text]) + list(contents.findings)
    parts = [f"### {mark}{_escaped(contents.title)}", _paragraph(" ".join(said)), _paragraph(contents.facts)]
    for table in (contents.artifacts, contents.tasks, contents.text, contents.gates):
        parts += [] if table is None else _table(table)
    parts += [f"Note: {_escaped(note)}" for note in (*contents.differences, *(f"{note}." for note in contents.notes))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(table: Table) -> Iterator[str]:
    """A table, and the paragraphs that explain it."""
    rule = ["---:" if column.right else "---" for column in table.columns]
    rows = [[_cell(column, cell) for column, cell in zip(table.columns, row, strict=True)] for row in table.rows]
    yield "\n".join(f"| {' | '.join(cells)} |" for cells in ([_escaped(column.name) for column in table.columns], rule, *rows))
    explained = " ".join(table.notes)
    if table.marked:
        explained += f" * {table.marked}."
    yield _paragraph(explained)


def _cell(column: Column, cell: Cell) -> str:
    text = cell.text
    if column.kind is Kind.LABEL and cell.tone is Tone.BAD:
        text = _OUTCOMES[Tone.BAD] + text
    if column.kind is Kind.NUMBER and cell.tone is not None:
        text += "*"
    return _escaped(text)


def _paragraph(text: str) -> str:
    """`text` as a paragraph that begins neither a heading nor a list."""
    return re.sub(r"^(\d*)([#+=.)-])", r"\1\\\2", _escaped(text))


def _escaped(text: str) -> str:
    """`text` in which nothing is Markdown or HTML, on one line."""
    line = " ".join(text.split())
    line = re.sub(r"[\\`*<>|~&]", r"\\\g<0>", line)
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # inside a word it is none
    return re.sub(r"\](?=[(\[:])", r"\\]", line)  # a link, unless nothing follows
