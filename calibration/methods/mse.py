"""Scales and tables of least squared error, weighted by the mean squares of the inputs where they are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.method import Job, Method, Prepared

if TYPE_CHECKING:
    from elmexport.quantization.recipes import Plan


class MSE(Method):
    """Least squared error of the weights, by activations where they are measured."""

    name = "mse"
    words = "the scale of least error, in seconds"
    measures_statistics = True

    def prepare(self, job: Job) -> Prepared:
        from calibration.facts import method_facts
        from calibration.statistics import mean_square_of
        from elmexport.quantization.weight_source import CheckpointWeights

        statistics = job.inputs.statistics
        if statistics is None and job.short_pass is not None and _searches(job.plan):
            statistics = job.short_pass()
        mean_square = None if statistics is None else mean_square_of(statistics.moments)
        return Prepared(CheckpointWeights(job.checkpoint, job.plan, "mse", mean_square), statistics, method_facts(self.name, statistics))


def _searches(plan: Plan) -> bool:
    """Whether there is something to search: 8-bit integers have scales from their largest value."""
    from elmexport.quantization.schemes import CodedScheme

    return any(isinstance(scheme, CodedScheme) and scheme.uses_importance for scheme in plan.schemes.values())
