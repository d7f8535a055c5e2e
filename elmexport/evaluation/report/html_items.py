"""The worst items as HTML: their texts, and what each model made of every choice."""

from __future__ import annotations

from collections.abc import Sequence

from elmexport.evaluation.report.markup import Cell, cell, table, text, verbatim
from elmexport.evaluation.report.overview import drop
from elmexport.evaluation.report.wording import nats, number
from elmexport.evaluation.report.worst import Loss, choice_scores, unit, worst_items
from elmexport.evaluation.results import Report, TaskResult

_TEXT = 4000  # characters of an item that the page shows; the question stands at the end
_SNIPPET = 90


def items_of(report: Report, count: int) -> str:
    """About `count` items of all tasks, the tasks that dropped most first; empty where no item lost anything."""
    names = sorted(report.tasks, key=lambda name: -(drop(report, name) or 0.0))
    each = max(1, count // max(len(names), 1))
    parts = []
    for name in names:
        task = report.tasks[name]
        if losses := worst_items(task, each):
            parts.append(f"<h3>{text(name)}</h3>")
            parts += [_item(task, loss) for loss in losses]
    return "\n".join(parts)


def _item(task: TaskResult, loss: Loss) -> str:
    item, per = loss.item, unit(task.metric)
    change = f"margin {_margin(loss.before)} to {_margin(loss.after)} {per}"
    tag = '<span class="tag bad">right → wrong</span>' if loss.flipped else '<span class="tag soft">margin lost</span>'
    snippet = " ".join(item.text[-_TEXT:].split())
    snippet = snippet if len(snippet) <= _SNIPPET else "…" + snippet[-_SNIPPET:]
    summary = f'{tag} {text(change)} <span class="snippet">· item {item.id} · <bdi>{verbatim(snippet)}</bdi></span>'
    shown = item.text if len(item.text) <= _TEXT else item.text[-_TEXT:]
    cut = "" if len(item.text) <= _TEXT else f'<p class="soft">The last {_TEXT:,} of {len(item.text):,} characters:</p>'
    body = f'{cut}<div class="text" dir="auto" tabindex="0" role="group" aria-label="Text of item {item.id}">{verbatim(shown)}</div>{_choices(task, loss)}'
    return f'<details class="item"><summary>{summary}</summary>{body}</details>'


def _margin(value: float) -> str:
    return number(value) if abs(value) < 1 else nats(value)


def _choices(task: TaskResult, loss: Loss) -> str:
    item, reference = loss.item, loss.item.reference
    assert reference is not None
    before, after = (choice_scores(item, scores, task.metric) for scores in (reference.scores, item.scores))
    picked_before, picked_after = _best(before), _best(after)
    rows: list[tuple[Cell, ...]] = []
    for i, (was, now) in enumerate(zip(reference.scores, item.scores, strict=True)):
        words = item.choices[i] if i < len(item.choices) else f"choice {i + 1}"
        role = "right" if i == item.target else "wrong"
        picks = [name for name, picked in (("reference", picked_before), ("artifact", picked_after)) if picked == i]
        note = role + (f", chosen by {' and '.join(picks)}" if picks else "")
        label = Cell(f'<bdi>{verbatim(words)}</bdi><br><span class="{"good" if role == "right" else "soft"}">{note}</span>')
        rows.append((label, cell(nats(was)), cell(nats(now)), cell(nats(now - was))))
    caption = "Log-likelihood of each choice, nats" + ("; choices are ranked per character" if task.metric == "acc_norm" else "")
    return table(caption, ("choice", ">reference", ">artifact", ">change"), rows, class_="choices")


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
