"""Mixed precision: a plan that is chosen for a size, or the smallest within a loss of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from calibration.allocate import Allocation, Costs, choose_bits, drop_name, measure_costs
from calibration.dequantized import Dequantized, DequantizedCheckpoint
from calibration.facts import rounded
from calibration.method import Gain, Prepared
from calibration.sensitivity import KLEvaluator
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.progress import Progress
from elmexport.quantization.recipes import Recipe
from elmexport.target import Target

STEP = 0.2  # bits per weight, between the sizes that a search may try

Prepare = Callable[[Recipe], Prepared]
"""Finds the weights under a recipe."""


@dataclass(frozen=True)
class AccuracyDrop:
    """Accuracy that other weights cost a model on one task, compared with its own item by item, in percentage points."""

    task: str
    items: int
    drop: float
    interval: tuple[float, float] | None  # of the drop, at 95 %
    detectable: float | None  # the smallest that so many items could show


MeasureDrop = Callable[[Checkpoint, str], AccuracyDrop]
"""Measures the accuracy that a model with other weights loses; the words are shown meanwhile."""


def of_size(
    checkpoint: Checkpoint, target: Target, base: Recipe, bits_per_weight: float, prepare: Prepare, *, gain: Gain, progress: Progress
) -> Prepared:
    """Choose the mix of least predicted divergence within `bits_per_weight`; the facts give the predicted cost and the measured one.

    Raises:
        ElmExportError: see `choose_bits`.
    """
    allocation, evaluator = choose_bits(checkpoint, target, base, bits_per_weight, gain=gain, progress=progress)
    return _described(prepare(allocation.recipe), {"asked": bits_per_weight}, allocation, evaluator)


@dataclass(frozen=True)
class _Trial:
    size: float  # as asked of the allocation
    allocation: Allocation
    cost: AccuracyDrop


def within_drop(
    checkpoint: Checkpoint,
    target: Target,
    base: Recipe,
    max_drop: float,
    prepare: Prepare,
    measure: MeasureDrop,
    *,
    gain: Gain,
    progress: Progress,
) -> Prepared:
    """Choose the smallest mix that loses at most `max_drop` percentage points of accuracy, as `measure` finds.

    Sizes are `STEP` apart, and each mix is the one of least predicted divergence at its size; bisection tries about five of them. What
    counts is the drop that was measured, as with the gate of the same name. The facts have it, its interval, and every trial.

    Raises:
        ElmExportError: not even the widest mix loses so little.
    """
    costs = measure_costs(checkpoint, target, base, gain=gain, progress=progress)
    sizes = _sizes(*costs.sizes())
    trials: list[_Trial] = []

    def passes(size: float) -> bool:
        trials.append(_try(checkpoint, measure, costs, size, prepare))
        return trials[-1].cost.drop <= max_drop

    size = smallest(sizes, passes)
    if size is None:
        raise ElmExportError(_unreachable(max_drop, trials[-1]))
    chosen = next(trial for trial in trials if trial.size == size)
    recipe = replace(chosen.allocation.recipe, name=drop_name(max_drop))
    cost = chosen.cost
    facts = {
        "max_drop": max_drop,
        "task": cost.task,
        "items": cost.items,
        "drop": rounded(cost.drop),
        "drop_interval": None if cost.interval is None else [rounded(end) for end in cost.interval],
        "detectable_drop": None if cost.detectable is None else rounded(cost.detectable),
        "trials": [{"bits_per_weight": rounded(trial.allocation.bits_per_weight), "drop": rounded(trial.cost.drop)} for trial in trials],
    }
    return _described(prepare(recipe), facts, chosen.allocation, costs.evaluator)


def _sizes(least: float, most: float) -> list[float]:
    start = ceil(least * 100) / 100  # so that the smallest is within reach
    count = max(0, ceil((most - start) / STEP))
    return [round(start + STEP * i, 2) for i in range(count + 1)]


def smallest(sizes: Sequence[float], passes: Callable[[float], bool]) -> float | None:
    """Find the smallest of `sizes` (ascending) that passes, by bisection; None where not even the largest does.

    Where passing is a matter of luck too, the result passes and the size before it, if any, does not. The smallest is tried first, for
    large models lose little; the largest only if all that were tried below it fail.
    """
    if passes(sizes[0]):
        return sizes[0]
    fails, good = 0, len(sizes) - 1
    while good - fails > 1:
        middle = (fails + good) // 2
        if passes(sizes[middle]):
            good = middle
        else:
            fails = middle
    # Bisection has tried every size it ends at but the largest.
    return sizes[good] if good and (good < len(sizes) - 1 or passes(sizes[good])) else None


def _try(checkpoint: Checkpoint, measure: MeasureDrop, costs: Costs, size: float, prepare: Prepare) -> _Trial:
    allocation = costs.allocate(size)
    weights = prepare(allocation.recipe).weights
    cost = measure(DequantizedCheckpoint(checkpoint, weights), f"{allocation.bits_per_weight:.2f} bits per weight")
    return _Trial(size, allocation, cost)


def _unreachable(max_drop: float, widest: _Trial) -> str:
    cost = widest.cost
    return (
        f"--max-drop {max_drop:g} is out of reach: even with the widest weights that can be mixed ({widest.allocation.bits_per_weight:.2f} bits "
        f"each) accuracy on {cost.task} falls by {cost.drop:.2f} points ({cost.items} items, so {100 / cost.items:.2g} points for each); "
        "allow more, choose --method gptq, or export with --quant fp16"
    )


def _described(prepared: Prepared, asked: dict[str, Any], allocation: Allocation, evaluator: KLEvaluator) -> Prepared:
    """`prepared` with the prediction and what was measured among its facts."""
    measured = rounded(evaluator.divergence(Dequantized(prepared.weights)))
    costs = {**asked, "predicted_kl": rounded(allocation.predicted_kl), "measured_kl": measured, "text": "bundled prose"}
    return replace(prepared, facts={**prepared.facts, "allocation": costs})
