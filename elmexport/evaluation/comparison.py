"""Comparison of an artifact's results with a reference's, paired item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.evaluation.results import Evaluation, Flips, Item, ItemScores, Report, TaskComparison, TaskResult
from elmexport.evaluation.statistics import (
    CONFIDENCE,
    Interval,
    bootstrap_interval,
    detectable_drop,
    detectable_mean_drop,
    mcnemar_p,
    paired_interval,
)
from elmexport.evaluation.text import bounded_exp

TANGO = "Tango's score interval, paired"
BOOTSTRAP = "bootstrap of paired items"
UNPAIRED = "none: the metric is not a mean over items"


def compare(artifact: Evaluation, reference: Evaluation | None, *, lm_eval: str | None = None) -> Report:
    """Compare `artifact` with a reference; its text pass has met the reference already. `lm_eval` is the version whose tasks were run.

    Raises:
        ElmExportError: a task that only one of the two has, or items that do not pair; the task is named.
    """
    tasks = dict(artifact.tasks)
    if reference is not None:
        for name, task in artifact.tasks.items():
            if name not in reference.tasks:
                raise ElmExportError(f"{name}: {reference.artifact.label} has no results for it; evaluate both on the same tasks")
            tasks[name] = compare_task(name, task, reference.tasks[name])
    text = artifact.text
    return Report(
        lm_eval=lm_eval,
        artifact=artifact.artifact,
        reference=None if reference is None else reference.artifact,
        settings=artifact.settings,
        tasks=tasks,
        kl=None if text is None else text.kl,
        perplexity=None if text is None else text.perplexity,
        blocks=None if text is None else text.blocks,
        gates=(),
        seconds=artifact.seconds,
    )


def compare_task(name: str, task: TaskResult, reference: TaskResult) -> TaskResult:
    """Compare a task, every item with the reference's scores.

    Raises:
        ElmExportError: other items, another metric or other few-shot examples than the reference's.
    """
    pairs = pair_items(name, task.items, reference.items)
    if task.fewshot != reference.fewshot:
        raise ElmExportError(f"{name}: {task.fewshot} few-shot examples, the reference has {reference.fewshot}; evaluate both alike")
    ours, theirs = (metric_values(name, items, task.metric) for items in zip(*pairs, strict=True))
    if task.metric.endswith("perplexity"):
        comparison = _compare_perplexity(task, reference, pairs)
    elif not _is_mean(task, ours) or not _is_mean(reference, theirs):
        comparison = _comparison(reference, _share_drop(task, reference), None, UNPAIRED)
    else:
        comparison = _compare_values(task, reference, ours, theirs)
    items = tuple(replace(item, reference=ItemScores(other.metrics, other.scores)) for item, other in pairs)
    return replace(task, items=items, comparison=comparison)


def pair_items(name: str, items: Sequence[Item], others: Sequence[Item]) -> list[tuple[Item, Item]]:
    """Pair each of `items` with the one of `others` that asks the same.

    Raises:
        ElmExportError: one has no counterpart.
    """
    by_key = {(item.id, item.hash): item for item in others}
    known = {item.id for item in others}
    pairs = []
    for item in items:
        other = by_key.get((item.id, item.hash))
        if other is None:
            why = "asks something else there" if item.id in known else "is not among them"
            raise ElmExportError(
                f"{name}: item {item.id} {why}, so the results do not pair; evaluate both with the same data, --limit, seed, few-shot setting and version"
            )
        pairs.append((item, other))
    if not pairs:
        raise ElmExportError(f"{name}: no items to compare")
    return pairs


def metric_values(name: str, items: Sequence[Item], metric: str) -> NDArray[np.float64]:
    """Values of `metric`, one for each item.

    Raises:
        ElmExportError: an item of the task `name` that lacks it.
    """
    lacking = next((item for item in items if metric not in item.metrics), None)
    if lacking is not None:
        raise ElmExportError(f"{name}: item {lacking.id} has no {metric}; evaluate both with the same version of elmexport")
    return np.array([item.metrics[metric] for item in items])


def drop_interval(differences: NDArray[np.float64], confidence: float = CONFIDENCE) -> tuple[Interval, str]:
    """Interval of the mean of per-item drops, and the method's name; drops of 0 and ±1 only are flips."""
    if np.isin(differences, (-1.0, 0.0, 1.0)).all():
        lost, won = int((differences > 0).sum()), int((differences < 0).sum())
        return paired_interval(lost, won, len(differences), confidence), TANGO
    return bootstrap_interval(differences, confidence=confidence), BOOTSTRAP


def _compare_values(task: TaskResult, reference: TaskResult, ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> TaskComparison:
    differences = theirs - ours if task.higher_is_better else ours - theirs
    interval, method = drop_interval(differences)
    drop = 100 * float(differences.mean())
    if method != TANGO:
        return replace(_comparison(reference, drop, interval, method), detectable_drop=100 * detectable_mean_drop(differences))
    lost, won = int((differences > 0).sum()), int((differences < 0).sum())
    return replace(
        _comparison(reference, drop, interval, method),
        flips=Flips(lost, won),
        mcnemar_p=mcnemar_p(lost, won),
        detectable_drop=100 * detectable_drop(lost, won, len(differences)),
    )


def _compare_perplexity(task: TaskResult, reference: TaskResult, pairs: Sequence[tuple[Item, Item]]) -> TaskComparison:
    """Ratio of perplexities; documents are resampled, each with its length (in words, bytes: whatever the metric counts)."""
    # exp(-log-likelihood / length) is a document's own perplexity
    lengths = np.array([-other.scores[0] / math.log(other.metrics[task.metric]) for _, other in pairs])
    losses = np.array([other.scores[0] - item.scores[0] for item, other in pairs])
    low, high = bootstrap_interval(losses, lengths)
    ratio = task.metrics[task.metric] / reference.metrics[task.metric]
    return replace(_comparison(reference, None, None, BOOTSTRAP), ratio=ratio, ratio_ci=(bounded_exp(low), bounded_exp(high)))


def _comparison(reference: TaskResult, drop: float | None, interval: Interval | None, method: str) -> TaskComparison:
    points = None if interval is None else (100 * interval[0], 100 * interval[1])
    return TaskComparison(reference.metrics, drop, points, method, None, None, None, None, None)


def _is_mean(task: TaskResult, values: NDArray[np.float64]) -> bool:
    return math.isclose(task.metrics[task.metric], float(values.mean()), rel_tol=1e-6, abs_tol=1e-9)


def _share_drop(task: TaskResult, reference: TaskResult) -> float | None:
    """Drop in points of a metric that is a share, but not the items' mean; None for any other."""
    ours, theirs = task.metrics[task.metric], reference.metrics[task.metric]
    if not (0 <= ours <= 1 and 0 <= theirs <= 1):
        return None
    return 100 * (theirs - ours if task.higher_is_better else ours - theirs)
