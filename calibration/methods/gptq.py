"""GPTQ of a whole model: along a text, each matrix fitted to what its quantized predecessors hand on, or from statistics with Hessians."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from calibration.methods.base import Gain, Job, Method, Prepared

if TYPE_CHECKING:
    from calibration.folding import FoldedCheckpoint


class GPTQ(Method):
    name = "gptq"
    words = "errors cancel along a calibration text, in minutes, at about a third of the loss"
    needs_text = True
    makes_weight_set = True
    gain = Gain(linear=0.33, table=0.7)  # about as in `tiny`, docs/quantization-results.md

    def prepare(self, job: Job) -> Prepared:
        from calibration.calibrated import gptq_weights
        from calibration.stored import prepared_set

        source = job.inputs.sample or job.inputs.statistics
        assert source is not None
        weights = gptq_weights(job.checkpoint, job.plan, source, job.progress, self._fold(job), method=self.name)
        return prepared_set(job.checkpoint, job.plan, weights, None if job.inputs.sample is not None else job.inputs.statistics)

    def _fold(self, job: Job) -> Callable[[], FoldedCheckpoint] | None:
        """What makes the model to quantize in the place of the job's, where it is another."""
        return None
