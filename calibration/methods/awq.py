"""AWQ: input channels with large activations are rescaled before they are rounded; what precedes them takes the inverse."""

from __future__ import annotations

from calibration.method import Job, Method, Prepared


class AWQ(Method):
    """AWQ: input channels are rescaled first, by their activations in a text."""

    name = "awq"
    words = "input channels are rescaled first, by what they read in a text"
    needs_text = True
    measures_statistics = True

    def prepare(self, job: Job) -> Prepared:
        from calibration.awq import awq_model
        from calibration.calibrated import moments_of
        from calibration.facts import method_facts
        from calibration.statistics import mean_square_of
        from elmexport.quantization.weight_source import CheckpointWeights

        statistics = job.inputs.statistics
        assert statistics is not None
        folded = awq_model(job.checkpoint, job.plan, statistics)
        weights = CheckpointWeights(folded, job.plan, "mse", mean_square_of(moments_of(folded, statistics)))
        return Prepared(weights, statistics, method_facts(self.name, statistics))
