"""Distillation of a whole model: GPTQ first, then scales, table entries and norms trained on the divergence from the model."""

from __future__ import annotations

from calibration.method import Job, Method, Prepared


class Distill(Method):
    """GPTQ, then training of scales and norms."""

    name = "distill"
    words = "gptq, then scales and norms trained on what is lost, which pays below 4 bits"
    needs_text = True
    takes_statistics = False
    makes_weight_set = True

    def prepare(self, job: Job) -> Prepared:
        from calibration.calibrated import distilled_weights
        from calibration.stored import prepared_set

        sample = job.inputs.sample
        assert sample is not None
        return prepared_set(job.checkpoint, job.plan, distilled_weights(job.checkpoint, job.plan, sample, job.progress))
