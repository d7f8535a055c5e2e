"""Worst items: those on which an artifact lost most of its margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elmexport.evaluation.results import Item, TaskResult


@dataclass(frozen=True)
class Loss:
    """Loss of margin on one item. A margin is the score of the right choice less that of the best wrong one, in `unit`."""

    item: Item
    before: float  # margin of the reference
    after: float  # margin of the artifact
    flipped: bool  # the reference was right, the artifact is wrong

    @property
    def amount(self) -> float:
        """Margin lost, in `unit`."""
        return self.before - self.after


def unit(metric: str) -> str:
    """Unit of the margins of a metric."""
    return "nats per character" if metric == "acc_norm" else "nats"


def choice_scores(item: Item, scores: Sequence[float], metric: str) -> list[float]:
    """Scores that `metric` ranks choices by: log-likelihoods, for `acc_norm` divided by the characters of each choice, as lm-eval does."""
    if metric == "acc_norm" and len(item.choices) == len(scores) and all(item.choices):
        return [score / len(choice) for score, choice in zip(scores, item.choices, strict=True)]
    return list(scores)


def worst_items(task: TaskResult, count: int) -> list[Loss]:
    """Select at most `count` items that lost margin, those whose answer turned wrong first, then by the margin lost.

    Items without one right choice (metrics that are not 0 or 1 for an item, or of which less is better) have no margin and are left out.
    """
    if not task.higher_is_better:
        return []
    losses = [loss for item in task.items if (loss := _loss(item, task)) is not None and (loss.flipped or loss.amount > 0)]
    return sorted(losses, key=lambda loss: (not loss.flipped, -loss.amount, loss.item.id))[:count]


def _loss(item: Item, task: TaskResult) -> Loss | None:
    reference, target = item.reference, item.target
    if reference is None or target is None or not 0 <= target < len(item.scores) or len(item.scores) < 2:
        return None
    was, now = reference.metrics.get(task.metric), item.metrics.get(task.metric)
    if len(reference.scores) != len(item.scores) or was not in (0.0, 1.0) or now not in (0.0, 1.0):
        return None
    before, after = (_margin(choice_scores(item, scores, task.metric), target) for scores in (reference.scores, item.scores))
    return Loss(item, before, after, flipped=(was, now) == (1.0, 0.0))


def _margin(scores: Sequence[float], target: int) -> float:
    return scores[target] - max(score for i, score in enumerate(scores) if i != target)
