"""One set of contents, and three forms that say all of it."""

from __future__ import annotations

import io
from itertools import count

import pytest
from rich.console import Console

from elmexport.evaluation.report.contents import Contents, contents_of
from elmexport.evaluation.report.html import html
from elmexport.evaluation.report.markdown import markdown
from elmexport.evaluation.report.table import Cell, Column, Kind, Table, Tone
from elmexport.evaluation.report.terminal import print_reports
from elmexport.evaluation.results import Report
from tests.evaluation.report import examples
from tests.evaluation.report.test_html import CASES


def tables(contents: Contents) -> list[Table]:
    found = (contents.artifacts, contents.tasks, *contents.scores, contents.text, contents.gates)
    return [table for table in found if table is not None]


@pytest.mark.parametrize("name", CASES)
def test_every_row_has_a_cell_for_each_column(name: str) -> None:
    for table in tables(contents_of(CASES[name])):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_numbers_have_a_value_to_sort_by() -> None:
    (table,) = [table for table in tables(contents_of([examples.report(gates=[])])) if table.sortable]
    unordered = {"95 % interval"}
    for i, column in enumerate(table.columns):
        if column.kind is Kind.NUMBER and column.name not in unordered:
            assert all(row[i].value is not None for row in table.rows if row[i].text), column.name


def test_a_task_beyond_noise_has_a_tone_in_its_reading_and_in_the_comparison() -> None:
    reports = examples.family()
    one, several = contents_of([reports[4]]).tasks, contents_of(reports).tasks
    assert one is not None and several is not None
    reading = [column.name for column in one.columns].index("reading")
    assert [row[reading].tone for row in one.rows] == [row[5].tone for row in several.rows]
    assert Tone.BAD in {row[reading].tone for row in one.rows}


class Words:
    """Words that stand nowhere else."""

    def __init__(self) -> None:
        self.numbers, self.said = count(), dict[str, list[str]]()

    def new(self, part: str) -> str:
        word = f"w{next(self.numbers):04}w"
        self.said.setdefault(part, []).append(word)
        return word

    def table(self, part: str, kinds: tuple[Kind, ...], rows: tuple[Tone | None, ...]) -> Table:
        columns = tuple(Column(self.new(f"{part} column"), kind, self.new(f"{part} short column")) for kind in kinds)
        cells = tuple(tuple(Cell(self.new(part), tone=tone) for _ in kinds) for tone in rows)
        return Table(self.new(f"{part} caption"), columns, cells, (self.new(part),), self.new(part))


def test_every_form_says_all_of_the_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    words, tones = Words(), (None, Tone.GOOD, Tone.BAD)
    kinds = (Kind.LABEL, Kind.QUALIFIER, Kind.NUMBER, Kind.SENTENCE)
    made = Contents(
        title=words.new("title"),
        verdict=Cell(words.new("verdict"), tone=Tone.BAD),
        findings=(words.new("findings"), words.new("findings")),
        facts=words.new("facts"),
        artifacts=words.table("artifacts", kinds, tones),
        tasks=words.table("tasks", kinds, tones),
        scores=(words.table("scores", kinds, tones),),
        text=Table(
            words.new("text caption"),
            (Column(words.new("text column")), Column("")),
            ((Cell(words.new("text")), Cell(words.new("text"))),),
        ),
        gates=Table(
            words.new("gates caption"),
            tuple(Column(words.new("gates column")) for _ in range(4)),
            tuple(tuple(Cell(words.new("gates"), tone=tone if i == 1 else None) for i in range(4)) for tone in tones[1:]),
        ),
        differences=(words.new("differences"),),
        notes=(words.new("notes"),),
        method=(words.new("method"),),
        made_by=words.new("made by"),
    )
    for form in ("html", "markdown", "terminal"):
        monkeypatch.setattr(f"elmexport.evaluation.report.{form}.contents_of", lambda _: made)
    reports: list[Report] = [examples.report(tasks=[], reference=False)]
    out = io.StringIO()
    print_reports(reports, Console(file=out, width=80, force_terminal=True, color_system=None, highlight=False))
    forms = {"html": html(reports), "markdown": markdown(reports), "terminal": out.getvalue().lower()}
    short = {part for part in words.said if part.endswith("short column")}
    captions = {part for part in words.said if part.endswith("caption")}
    unsaid = {
        # names of values need no heading; qualifiers stand below the names, their words unchanged
        "html": short | {"text caption", "text column"},
        "markdown": captions | short | {"scores", "scores column", "method", "made by"},
        "terminal": captions
        | {part.replace("short ", "") for part in short}
        | {"scores", "scores short column", "gates column", "method", "made by"},
    }
    qualifiers = {word for part in ("artifacts", "tasks", "scores") for word in _second(words, part)}
    for form, text in forms.items():
        for part, said in words.said.items():
            missing = [word for word in said if word not in text and not (form != "markdown" and word in qualifiers)]
            assert part in unsaid[form] or not missing, (form, part, missing)


def _second(words: Words, part: str) -> tuple[str, str]:
    """The two names of the column of qualifiers, which only Markdown shows."""
    return words.said[f"{part} column"][1], words.said[f"{part} short column"][1]
