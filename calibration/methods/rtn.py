"""Round to nearest: scales from the largest value of a group."""

from __future__ import annotations

from calibration.method import Job, Method, Prepared


class RTN(Method):
    """Round to nearest."""

    name = "rtn"
    words = "round to nearest"
    measures_statistics = True

    def prepare(self, job: Job) -> Prepared:
        from calibration.facts import method_facts
        from elmexport.quantization.weight_source import CheckpointWeights

        weights = CheckpointWeights(job.checkpoint, job.plan, "rtn")
        return Prepared(weights, job.inputs.statistics, method_facts(self.name, None))
