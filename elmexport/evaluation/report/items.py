"""Worst items as a report shows them: their texts, and what each model made of every choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elmexport.evaluation.report.overview import drop
from elmexport.evaluation.report.table import Cell, Column, Kind, Table, Tone, number_column
from elmexport.evaluation.report.wording import nats, number
from elmexport.evaluation.report.worst import Loss, choice_scores, unit, worst_items
from elmexport.evaluation.results import Report, TaskResult

_TEXT = 4000  # characters of an item that are shown; the question stands at the end
_SNIPPET = 90


@dataclass(frozen=True)
class ShownItem:
    """One item on which the artifact lost margin.

    Args:
        change: the margin before and after, with its unit.
        snippet: the end of the item's text, on one line.
        cut: what of the text is left out; empty where nothing is.
        choices: log-likelihoods of every choice.
    """

    id: int
    flipped: bool
    change: str
    snippet: str
    cut: str
    text: str
    choices: Table


def shown_items(report: Report, count: int) -> list[tuple[str, list[ShownItem]]]:
    """About `count` items by task, the tasks that dropped most first; empty where no item lost anything."""
    names = sorted(report.tasks, key=lambda name: -(drop(report, name) or 0.0))
    each = max(1, count // max(len(names), 1))
    found = [(name, [_shown(report.tasks[name], loss) for loss in worst_items(report.tasks[name], each)]) for name in names]
    return [(name, items) for name, items in found if items]


def _shown(task: TaskResult, loss: Loss) -> ShownItem:
    text = loss.item.text
    snippet = " ".join(text[-_TEXT:].split())
    return ShownItem(
        id=loss.item.id,
        flipped=loss.flipped,
        change=f"margin {_margin(loss.before)} to {_margin(loss.after)} {unit(task.metric)}",
        snippet=snippet if len(snippet) <= _SNIPPET else "…" + snippet[-_SNIPPET:],
        cut="" if len(text) <= _TEXT else f"The last {_TEXT:,} of {len(text):,} characters:",
        text=text[-_TEXT:],
        choices=_choices(task, loss),
    )


def _margin(value: float) -> str:
    return number(value) if abs(value) < 1 else nats(value)


def _choices(task: TaskResult, loss: Loss) -> Table:
    item, reference = loss.item, loss.item.reference
    assert reference is not None
    before, after = (choice_scores(item, scores, task.metric) for scores in (reference.scores, item.scores))
    best = (("reference", _best(before)), ("artifact", _best(after)))
    rows = []
    for i, (was, now) in enumerate(zip(reference.scores, item.scores, strict=True)):
        right = i == item.target
        by = " and ".join(name for name, picked in best if picked == i)
        words = ("right" if right else "wrong") + (f", chosen by {by}" if by else "")
        choice = item.choices[i] if i < len(item.choices) else f"choice {i + 1}"
        note = Cell(words, tone=Tone.GOOD if right else None)
        rows.append((Cell(choice, quoted=True), note, Cell(nats(was)), Cell(nats(now)), Cell(nats(now - was))))
    caption = "Log-likelihood of each choice, nats" + ("; choices are ranked per character" if task.metric == "acc_norm" else "")
    columns = (
        Column("choice"),
        Column("answer", Kind.QUALIFIER),
        number_column("reference"),
        number_column("artifact"),
        number_column("change"),
    )
    return Table(caption, columns, tuple(rows))


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
