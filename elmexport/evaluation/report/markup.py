"""Pieces of HTML that the parts of the page share. Whatever comes from a report passes through `text` or `verbatim`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from elmexport.evaluation.report.svg import swatch


@dataclass(frozen=True)
class Cell:
    """A table's cell: markup, what it sorts by where that is not its text, and a class."""

    markup: str
    value: float | None = None
    class_: str = ""


def verbatim(words: str) -> str:
    """`words` of somebody else as markup; control characters, which HTML cannot hold, become the replacement character."""
    return escape("".join("\ufffd" if (c < " " and c not in "\n\t") or c == "\x7f" else c for c in words))


def text(words: str) -> str:
    """Words of our own as markup: no line ends inside of `5 %` or `0-shot`."""
    return verbatim(words.replace(" %", "\u00a0%").replace("-shot", "\u2011shot"))


def cell(words: str, value: float | None = None, class_: str = "") -> Cell:
    """A cell of plain text."""
    return Cell(text(words), value, class_)


def judged(words: str, passed: bool) -> str:
    """An outcome in the colour of a pass or a failure; empty words stay empty."""
    return f'<span class="{"good" if passed else "bad"}">{text(words)}</span>' if words else ""


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, sortable: bool = False, class_: str = "") -> str:
    """A table that scrolls sideways by itself where it is wider than the page. Names of right-aligned columns start with `>`."""
    right = [name.startswith(">") for name in columns]
    heads = "".join(_head(name.removeprefix(">"), "num" if r else "") for name, r in zip(columns, right, strict=True))
    body = "\n".join(f"<tr>{''.join(_cell(c, i, right[i], sortable) for i, c in enumerate(row))}</tr>" for row in rows)
    attributes = (" data-sort" if sortable else "") + (f' class="{class_}"' if class_ else "")
    inner = f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    scrolled = f'<div class="scroll" tabindex="0" role="group" aria-label="{text(caption)}"><table{attributes}>{inner}</table></div>'
    return f'<p class="caption">{text(caption)}</p>\n{scrolled}'  # outside of what scrolls, where a narrow page would cut it


def _head(name: str, class_: str) -> str:
    return f'<th scope="col"{_class(class_)}>{text(name)}</th>' if name else f"<td{_class(class_)}></td>"


def _cell(content: Cell, column: int, right: bool, sortable: bool) -> str:
    classes = _class(" ".join(filter(None, ("num" if right else "", content.class_))))
    value = f' data-value="{content.value:.10g}"' if sortable and content.value is not None else ""
    return f'<th scope="row"{classes}{value}>{content.markup}</th>' if column == 0 else f"<td{classes}{value}>{content.markup}</td>"


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def figure(drawings: Sequence[str], caption: str, legend: Sequence[tuple[int, str]], equivalent: str = "") -> str:
    """A plot: the same drawing for wide and for narrow pages, its legend, and its figures as a table to unfold."""
    entries = "".join(f"<li>{swatch(series)}<span>{text(name)}</span></li>" for series, name in legend)
    parts = [
        f'<ul class="legend">{entries}</ul>' if entries else "",
        *drawings,
        f"<figcaption>{text(caption)}</figcaption>",
        f'<details class="figures"><summary>The same figures as a table</summary>{equivalent}</details>' if equivalent else "",
    ]
    return "<figure>\n" + "\n".join(filter(None, parts)) + "\n</figure>"
