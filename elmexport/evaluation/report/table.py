"""Tables of a report, the same in every form of it: columns, cells and the words around them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Kind(Enum):
    """Kind of a column's content, from which each form decides how to set it."""

    LABEL = auto()  # a few words, aligned to the left
    NUMBER = auto()  # a number, aligned to the right
    SENTENCE = auto()  # words that may take several lines
    QUALIFIER = auto()  # what the row's name does not say, such as its metric; may stand with the name


class Tone(Enum):
    """Severity of a cell."""

    GOOD = auto()
    BAD = auto()


@dataclass(frozen=True)
class Column:
    """A column: its name, a shorter name for narrow forms, and what it holds."""

    name: str
    kind: Kind = Kind.LABEL
    short: str = ""

    @property
    def right(self) -> bool:
        """Whether the column is aligned to the right."""
        return self.kind is Kind.NUMBER


@dataclass(frozen=True)
class Cell:
    """A cell: its text, the number it sorts by where it has one, and its severity.

    Args:
        quoted: the text is an item's own, shown as it is, in its own direction of writing.
    """

    text: str = ""
    value: float | None = None
    tone: Tone | None = None
    quoted: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Args:
        notes: sentences that explain the columns.
        marked: what it means that a number has a tone; empty where none can have one.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    marked: str = ""
    sortable: bool = False


def number_column(name: str, short: str = "") -> Column:
    """A column of numbers."""
    return Column(name, Kind.NUMBER, short)
