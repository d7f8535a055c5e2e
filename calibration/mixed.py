"""Mixed precision: a plan that is chosen for a size, or the smallest within a loss of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

from calibration.allocate import Allocation, choose_bits, drop_name, measure_costs
from calibration.dequantized import DequantizedCheckpoint
from calibration.facts import rounded
from calibration.gains import FindWeights
from calibration.guard import held_out_loss
from calibration.method import Prepared
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


Half = Literal["search", "report"]
"""Which half of the items of a task: those that a choice is made on, or those that it is reported on."""

MeasureDrop = Callable[[Checkpoint, Half, str], AccuracyDrop]
"""Measures the accuracy that a model with other weights loses on half of the items; the words are shown meanwhile."""


@dataclass(frozen=True)
class Search:
    """Inputs of a choice of bits: the model, the target that will hold it, and how weights are found.

    `find` finds those of a trial, see `measure_costs`; `try_out` those of a candidate, `finish` those of the choice.
    """

    checkpoint: Checkpoint
    target: Target
    base: Recipe
    find: FindWeights | None
    try_out: Prepare
    finish: Prepare
    progress: Progress

    def described(self, recipe: Recipe, asked: dict[str, Any], allocation: Allocation, text: str) -> Prepared:
        """The weights of the choice, with the prediction and what was measured among their facts."""
        prepared = self.finish(recipe)
        measured = prepared.facts.get("held_out") or held_out_loss(self.checkpoint, prepared.weights)
        costs = {
            **asked,
            "predicted_kl": rounded(allocation.predicted_kl),
            "predicted_on": text,
            "measured_kl": measured["kl"],
            "text": measured["text"],
        }
        return replace(prepared, facts={**prepared.facts, "allocation": costs})


def of_size(search: Search, bits_per_weight: float) -> Prepared:
    """Choose the mix of least predicted divergence within `bits_per_weight`; the facts give the predicted cost and the measured one.

    Raises:
        ElmExportError: see `choose_bits`.
    """
    allocation, text = choose_bits(search.checkpoint, search.target, search.base, bits_per_weight, search.find, search.progress)
    return search.described(allocation.recipe, {"asked": bits_per_weight}, allocation, text)


@dataclass(frozen=True)
class _Trial:
    size: float  # as asked of the allocation
    allocation: Allocation
    cost: AccuracyDrop


def within_drop(search: Search, max_drop: float, measure: MeasureDrop) -> Prepared:
    """Choose the smallest mix that loses at most `max_drop` percentage points of accuracy, as `measure` finds.

    Sizes are `STEP` apart, and each mix is the one of least predicted divergence at its size; bisection tries about five of them. Half of
    the items choose; what the choice loses on the other half is in the facts, with its interval and every trial, and in a note if it is
    more than `max_drop`.

    Raises:
        ElmExportError: not even the widest mix loses so little.
    """
    costs = measure_costs(search.checkpoint, search.target, search.base, search.find, search.progress)
    sizes = _sizes(*costs.sizes())
    trials: list[_Trial] = []

    def passes(size: float) -> bool:
        allocation = costs.allocate(size)
        trials.append(_Trial(size, allocation, _drop(search, search.try_out(allocation.recipe), measure, "search")))
        return trials[-1].cost.drop <= max_drop

    size = smallest(sizes, passes)
    if size is None:
        raise ElmExportError(_unreachable(max_drop, trials[-1]))
    chosen = next(trial for trial in trials if trial.size == size)
    prepared = search.described(
        replace(chosen.allocation.recipe, name=drop_name(max_drop)), {"max_drop": max_drop}, chosen.allocation, costs.text
    )
    cost = _drop(search, prepared, measure, "report")
    facts = {
        **prepared.facts["allocation"],
        "task": cost.task,
        "searched_items": chosen.cost.items,
        "items": cost.items,
        "drop": rounded(cost.drop),
        "drop_interval": None if cost.interval is None else [rounded(end) for end in cost.interval],
        "detectable_drop": None if cost.detectable is None else rounded(cost.detectable),
        "trials": [{"bits_per_weight": rounded(trial.allocation.bits_per_weight), "drop": rounded(trial.cost.drop)} for trial in trials],
    }
    notes = prepared.notes
    if cost.drop > max_drop:
        notes = (
            *notes,
            f"chosen to lose at most {max_drop:g} points of accuracy, as it does on the {chosen.cost.items} items that chose; on {cost.items} others "
            f"it loses {cost.drop:.2f}. So few items cannot tell such drops apart: see the interval in the manifest",
        )
    return replace(prepared, facts={**prepared.facts, "allocation": facts}, notes=notes)


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


def _drop(search: Search, prepared: Prepared, measure: MeasureDrop, half: Half) -> AccuracyDrop:
    words = f"{prepared.plan.bits_per_weight:.2f} bits per weight"
    return measure(DequantizedCheckpoint(search.checkpoint, prepared.weights), half, words)


def _unreachable(max_drop: float, widest: _Trial) -> str:
    cost = widest.cost
    return (
        f"--max-drop {max_drop:g} is out of reach: even with the widest weights that can be mixed ({widest.allocation.bits_per_weight:.2f} bits "
        f"each) accuracy on {cost.task} falls by {cost.drop:.2f} points ({cost.items} items, so {100 / cost.items:.2g} points for each); "
        "allow more, choose --method gptq, or export with --quant fp16"
    )
