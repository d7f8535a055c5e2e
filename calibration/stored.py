"""Weights of an export out of a weight set: one that GPTQ computes or the cache holds, or the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from calibration.calibrated import gptq_weights
from calibration.facts import set_facts
from calibration.folding import FoldedCheckpoint
from calibration.method import Job, Prepared
from calibration.statistics import Statistics
from calibration.weight_set import StoredWeights, WeightSet
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import listed
from elmexport.quantization.recipes import Plan


def prepare_gptq(job: Job, method: str, fold: Callable[[], FoldedCheckpoint] | None = None) -> Prepared:
    """Find the codes of `job` by GPTQ; see `gptq_weights`.

    Raises:
        ElmExportError: see `gptq_weights`.
    """
    source = job.inputs.sample or job.inputs.statistics
    assert source is not None
    weights = gptq_weights(job.checkpoint, job.plan, source, job.progress, fold, method=method)
    return prepared_set(job.checkpoint, job.plan, weights, source if isinstance(source, Statistics) else None)


def prepared_set(checkpoint: Checkpoint, plan: Plan, weights: WeightSet, statistics: Statistics | None = None) -> Prepared:
    """Take the codes of `weights`, which have passed `WeightSet.check`; `statistics` are what they were found with, if that is known."""
    notes = tuple(
        f"{name}: its Hessian was not positive definite and took {value:g} of its mean diagonal as damping; calibrate on more text"
        for name, value in weights.damped().items()
    )
    distilled = weights.facts.distilled
    if distilled is not None:
        before, after = distilled["before"], distilled["after"]
        notes = (f"distilled: KL {before:.4f} → {after:.4f} nats per token on windows held out of the calibration text", *notes)
    facts, scarce = set_facts(weights.facts), weights.scarce()
    if scarce:
        facts["scarce_experts"] = scarce
        few = listed([f"{name} ({count} tokens)" for name, count in scarce.items()])
        notes += (
            f"{len(scarce)} matrices of experts were reached by fewer tokens than they have inputs, and rounded by weighted least squares instead "
            f"of GPTQ: {few}. Calibrate on more text",
        )
    return Prepared(StoredWeights(checkpoint, plan, weights), statistics, facts, notes)


def read_set(checkpoint: Checkpoint, plan: Plan, path: Path) -> Prepared:
    """Take the codes of the weight set in `path`.

    Raises:
        ElmExportError: see `WeightSet.load` and `WeightSet.check`.
    """
    weights = WeightSet.load(path)
    weights.check(checkpoint, plan)
    return prepared_set(checkpoint, plan, weights)
