"""Sensitivity of each matrix: the divergence when it alone is quantized, measured once, predicted for other schemes.

The model reads a short text; KL(model || model with one matrix quantized) is measured on its logits, with the narrowest of the candidate
schemes. The divergence is quadratic in a small error, so that of another scheme is predicted by the ratio of their squared output errors (with
the mean squares of the inputs), and that of several matrices by the sum: their errors are independent. Layers that a matrix does not reach
are not run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.statistics import Statistics
from calibration.table import EMBEDDING_PART
from calibration.text import Sample
from elmexport.checkpoint.base import Checkpoint
from elmexport.divergence import token_divergence
from elmexport.graph.device import torch_device
from elmexport.graph.forward import GetWeight, layer_stages, stage_by_stage
from elmexport.models import trace
from elmexport.progress import Progress
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import CodedScheme
from elmexport.weights import Role, WeightSpec


@dataclass(frozen=True)
class Sensitivity:
    """Divergence (nats per token) that one matrix alone causes, for each scheme that it can take."""

    spec: WeightSpec
    kl: Mapping[CodedScheme, float]


@torch.inference_mode()
def sensitivities(
    checkpoint: Checkpoint,
    candidates: Mapping[str, Sequence[CodedScheme]],
    statistics: Statistics,
    evaluator: KLEvaluator,
    progress: Progress,
) -> list[Sensitivity]:
    """Measure the sensitivity of every matrix that `candidates` names, for the schemes that it gives.

    `statistics` weight errors, and should be of another text than the one that `evaluator` reads.
    """
    specs = [spec for spec in checkpoint.specs.values() if spec.name in candidates]
    progress.stage("measuring what each matrix costs", len(specs))
    found = []
    for spec in specs:
        weight = checkpoint.tensor(spec.name).to(torch.float32)
        moments = statistics.moments(spec)
        energy = torch.ones(spec.shape[1]) if moments is None else moments.mean_square
        if spec.role is Role.EMBEDDING:  # its rows are read one at a time too, and then no channel counts more than another
            energy = energy / energy.mean() + EMBEDDING_PART
        schemes = sorted(candidates[spec.name], key=lambda scheme: scheme.bits(spec.shape))
        rounded = [quantize(weight, scheme, "quick", None if moments is None else moments.mean_square).dequantize() for scheme in schemes]
        measured = evaluator.divergence({spec.name: rounded[0]})
        errors = [float((rounding.sub_(weight).square_() @ energy).sum()) for rounding in rounded]
        found.append(Sensitivity(spec, {s: measured * (e / errors[0] if errors[0] else 0.0) for s, e in zip(schemes, errors, strict=True)}))
        progress.advance(1)
    return found


class KLEvaluator:
    """KL divergence of a model from itself with some weights replaced, on the logits of one sample.

    The residual stream before each stage is kept, so that only what a weight reaches runs again.
    """

    @torch.inference_mode()
    def __init__(self, checkpoint: Checkpoint, sample: Sample) -> None:
        self._checkpoint = checkpoint
        self._stages = layer_stages(trace(checkpoint.config, sample.window))
        ids = torch.from_numpy(sample.ids)
        self._inputs = [ids, *stage_by_stage(self._stages, self._weights({}), ids, torch_device())]
        self._reference = _rows(self._inputs.pop())

    @torch.inference_mode()
    def divergence(self, changed: Mapping[str, Tensor]) -> float:
        """Measure the mean KL (nats per token) of the model with the float32 tensors `changed` in the place of its own."""
        last = len(self._stages) - 1
        first = next((i for i, stage in enumerate(self._stages) if any(spec.name in changed for spec in stage.weights())), last)
        *_, logits = stage_by_stage(self._stages[first:], self._weights(changed), self._inputs[first], torch_device())
        return float(np.mean(token_divergence(self._reference, _rows(logits))))

    def _weights(self, changed: Mapping[str, Tensor]) -> GetWeight:
        return lambda spec: changed[spec.name] if spec.name in changed else self._checkpoint.tensor(spec.name)


def _rows(logits: Tensor) -> NDArray[np.float32]:
    return logits.flatten(0, 1).numpy()
