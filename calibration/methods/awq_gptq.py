"""AWQ, then GPTQ: the codes of the rescaled model are found by GPTQ."""

from __future__ import annotations

from calibration.method import Job, Method, Prepared


class AWQGPTQ(Method):
    """AWQ, and GPTQ on the rescaled weights."""

    name = "awq+gptq"
    words = "both"
    needs_text = True
    measures_statistics = True
    makes_weight_set = True

    def prepare(self, job: Job) -> Prepared:
        from calibration.awq import awq_model
        from calibration.folding import FoldedCheckpoint
        from calibration.stored import prepare_gptq

        def fold() -> FoldedCheckpoint:
            assert job.inputs.statistics is not None
            return awq_model(job.checkpoint, job.plan, job.inputs.statistics)

        return prepare_gptq(job, self.name, fold)
