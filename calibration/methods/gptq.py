"""GPTQ of a whole model: along a text, each matrix fitted to its quantized predecessors, or from statistics with Hessians."""

from __future__ import annotations

from calibration.method import Job, Method, Prepared


class GPTQ(Method):
    """GPTQ of all matrices, in the order of the layers or from statistics."""

    name = "gptq"
    words = "errors cancel along a calibration text, in minutes, at about a quarter of the loss"
    needs_text = True
    makes_weight_set = True

    def prepare(self, job: Job) -> Prepared:
        from calibration.stored import prepare_gptq

        return prepare_gptq(job, self.name)
