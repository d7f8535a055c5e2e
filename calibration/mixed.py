"""Exports that choose their schemes by themselves: for a size, or the smallest within a loss of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from calibration.allocate import Allocation, Costs, choose_bits, drop_name, measure_costs
from calibration.dequantized import Dequantized, DequantizedCheckpoint
from calibration.preparation import Prepared, rounded
from calibration.sensitivity import KLEvaluator
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.evaluation.results import TaskComparison, TaskResult
from elmexport.evaluation.task_drop import TaskDrop
from elmexport.progress import Progress
from elmexport.quantization.recipes import Recipe
from elmexport.target import Target

STEP = 0.2  # bits per weight, between the sizes that a search may try

Prepare = Callable[[Recipe, bool], Prepared]
"""Weights under a recipe; the flag says that they are the ones to be written."""


def of_size(
    checkpoint: Checkpoint, target: Target, base: Recipe, bits_per_weight: float, prepare: Prepare, *, gptq: bool, progress: Progress
) -> Prepared:
    """The mix of least predicted divergence within `bits_per_weight`; the facts say what it was predicted to cost and what it costs.

    Raises:
        ElmExportError: see `choose_bits`.
    """
    allocation, evaluator = choose_bits(checkpoint, target, base, bits_per_weight, gptq=gptq, progress=progress)
    return _described(prepare(allocation.recipe, True), {"asked": bits_per_weight}, allocation, evaluator)


@dataclass(frozen=True)
class _Trial:
    size: float  # as asked of the allocation
    allocation: Allocation
    result: TaskResult

    @property
    def comparison(self) -> TaskComparison:
        assert self.result.comparison is not None
        return self.result.comparison

    @property
    def drop(self) -> float:
        """Percentage points."""
        assert self.comparison.drop is not None
        return self.comparison.drop


def within_drop(
    checkpoint: Checkpoint, target: Target, base: Recipe, max_drop: float, prepare: Prepare, *, gptq: bool, progress: Progress
) -> Prepared:
    """The smallest mix that loses at most `max_drop` percentage points on the bundled cloze task against the fp16 model.

    Sizes are `STEP` apart, and each mix is the one of least predicted divergence at its size; bisection tries about five of them. What
    counts is the drop that was measured, as with the gate of the same name. The facts have it, its interval, and every trial.

    Raises:
        ElmExportError: a model without a tokenizer, or not even the widest mix loses so little.
    """
    task = TaskDrop(checkpoint, progress)
    costs = measure_costs(checkpoint, target, base, gptq=gptq, progress=progress)
    sizes = _sizes(*costs.sizes())
    trials: list[_Trial] = []

    def passes(size: float) -> bool:
        trial = _try(checkpoint, task, costs, size, prepare, progress)
        trials.append(trial)
        return trial.drop <= max_drop

    size = smallest(sizes, passes)
    if size is None:
        raise ElmExportError(_unreachable(max_drop, trials[-1]))
    chosen = next(trial for trial in trials if trial.size == size)
    recipe = replace(chosen.allocation.recipe, name=drop_name(max_drop))
    compared, interval = chosen.comparison, chosen.comparison.drop_ci
    facts = {
        "max_drop": max_drop,
        "task": "cloze",
        "items": chosen.result.n,
        "drop": rounded(chosen.drop),
        "drop_interval": None if interval is None else [rounded(end) for end in interval],
        "detectable_drop": None if compared.detectable_drop is None else rounded(compared.detectable_drop),
        "trials": [{"bits_per_weight": rounded(trial.allocation.bits_per_weight), "drop": rounded(trial.drop)} for trial in trials],
    }
    return _described(prepare(recipe, True), facts, chosen.allocation, costs.evaluator)


def _sizes(least: float, most: float) -> list[float]:
    start = ceil(least * 100) / 100  # so that the smallest is within reach
    count = max(0, ceil((most - start) / STEP))
    return [round(start + STEP * i, 2) for i in range(count + 1)]


def smallest(sizes: Sequence[float], passes: Callable[[float], bool]) -> float | None:
    """The smallest of `sizes` (ascending) that passes, by bisection; None where not even the largest does.

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


def _try(checkpoint: Checkpoint, task: TaskDrop, costs: Costs, size: float, prepare: Prepare, progress: Progress) -> _Trial:
    allocation = costs.allocate(size)
    weights = prepare(allocation.recipe, False).weights
    result = task.measure(DequantizedCheckpoint(checkpoint, weights), f"{allocation.bits_per_weight:.2f} bits per weight", progress)
    return _Trial(size, allocation, result)


def _unreachable(max_drop: float, widest: _Trial) -> str:
    return (
        f"--max-drop {max_drop:g} is out of reach: even with the widest weights that can be mixed ({widest.allocation.bits_per_weight:.2f} bits "
        f"each) accuracy on cloze falls by {widest.drop:.2f} points ({widest.result.n} items, so {100 / widest.result.n:.2g} points for each); "
        "allow more, choose --method gptq, or export with --quant fp16"
    )


def _described(prepared: Prepared, asked: dict[str, Any], allocation: Allocation, evaluator: KLEvaluator) -> Prepared:
    """`prepared` with the prediction and what was measured among its facts."""
    measured = rounded(evaluator.divergence(Dequantized(prepared.weights)))
    costs = {**asked, "predicted_kl": rounded(allocation.predicted_kl), "measured_kl": measured, "text": "bundled prose"}
    return replace(prepared, facts={**prepared.facts, "allocation": costs})
