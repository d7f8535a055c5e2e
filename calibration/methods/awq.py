"""AWQ: input channels with large activations are rescaled before they are rounded; what precedes them takes the inverse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.methods.base import Job, Method, Prepared

if TYPE_CHECKING:
    from calibration.folding import FoldedCheckpoint


class AWQ(Method):
    name = "awq"
    words = "input channels are rescaled first, by what they read in a text"
    needs_text = True

    def prepare(self, job: Job) -> Prepared:
        from calibration.calibrated import moments_of
        from calibration.facts import method_facts
        from calibration.statistics import mean_square_of
        from elmexport.quantization.weight_source import CheckpointWeights

        statistics = job.inputs.statistics
        assert statistics is not None
        folded = fold(job)
        weights = CheckpointWeights(folded, job.plan, "mse", mean_square_of(moments_of(folded, statistics)))
        return Prepared(weights, statistics, method_facts(self.name, statistics))


def fold(job: Job) -> FoldedCheckpoint:
    """The job's model with its input channels rescaled."""
    from calibration.awq import awq_folds
    from calibration.folding import FoldedCheckpoint

    assert job.inputs.statistics is not None
    folds = awq_folds(job.checkpoint, lambda spec: job.plan.schemes[spec.name], job.inputs.statistics)
    return FoldedCheckpoint(job.checkpoint, folds)
