"""A weight set as the weights of an export."""

from __future__ import annotations

from pathlib import Path

from calibration.facts import set_facts
from calibration.methods.base import Prepared
from calibration.statistics import Statistics
from calibration.weight_set import StoredWeights, WeightSet
from elmexport.checkpoint.base import Checkpoint
from elmexport.quantization.recipes import Plan


def prepared_set(checkpoint: Checkpoint, plan: Plan, weights: WeightSet, statistics: Statistics | None = None) -> Prepared:
    """Take the codes of `weights`, which have passed `WeightSet.check`; `statistics` are what they were found with, if that is known."""
    notes = tuple(
        f"{name}: its Hessian was not positive definite and took {value:g} of its mean diagonal as damping (0.01 is usual); calibrate on more text"
        for name, value in weights.damped().items()
    )
    return Prepared(StoredWeights(checkpoint, plan, weights), statistics, set_facts(weights.facts), notes)


def read_set(checkpoint: Checkpoint, plan: Plan, path: Path) -> Prepared:
    """Take the codes of the weight set in `path`.

    Raises:
        ElmExportError: see `WeightSet.load` and `WeightSet.check`.
    """
    weights = WeightSet.load(path)
    weights.check(checkpoint, plan)
    return prepared_set(checkpoint, plan, weights)
