"""What each matrix costs when it alone is quantized: measured once for each, predicted from there for other schemes.

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

from calibration.collect import collect
from calibration.table import EMBEDDING_PART
from calibration.text import Sample
from elmexport.checkpoint.base import Checkpoint
from elmexport.evaluation.metrics import token_divergence
from elmexport.graph.ir import Graph
from elmexport.graph.layerwise import Stage, stages
from elmexport.models import trace
from elmexport.progress import Progress
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import Integer, Lut
from elmexport.weights import Role, WeightSpec


@dataclass(frozen=True)
class Sensitivity:
    """Of one matrix: for each scheme that it can take, the divergence (nats per token) that it alone causes."""

    spec: WeightSpec
    kl: Mapping[Integer | Lut, float]


@torch.inference_mode()
def sensitivities(
    checkpoint: Checkpoint, candidates: Mapping[str, Sequence[Integer | Lut]], sample: Sample, probe: Probe, progress: Progress
) -> list[Sensitivity]:
    """Of every matrix that `candidates` names, for the schemes that it gives; `probe` reads `sample`."""
    statistics = collect(checkpoint, sample, progress=progress)
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
        rounded = [quantize(weight, scheme, "mse", moments).dequantize() for scheme in schemes]
        measured = probe.divergence({spec.name: rounded[0]})
        errors = [float((rounding.sub_(weight).square_() @ energy).sum()) for rounding in rounded]
        found.append(Sensitivity(spec, {s: measured * (e / errors[0] if errors[0] else 0.0) for s, e in zip(schemes, errors, strict=True)}))
        progress.advance(1)
    return found


class Probe:
    """The model on one sample: its logits, and the residual stream before each stage, from where it can be run again."""

    @torch.inference_mode()
    def __init__(self, checkpoint: Checkpoint, sample: Sample) -> None:
        self._checkpoint = checkpoint
        self._graph: Graph = trace(checkpoint.config, sample.window)
        self._stages: list[Stage] = stages(self._graph)
        self._streams: list[Tensor] = []
        x = torch.from_numpy(sample.ids)
        for stage in self._stages:
            self._streams.append(x)
            x = self._run(stage, x, {})
        self._reference = self._logits(x, {})

    @torch.inference_mode()
    def divergence(self, changed: Mapping[str, Tensor]) -> float:
        """Mean KL (nats per token) of the model with the float32 tensors `changed` in the place of its own."""
        first = next(
            i for i, stage in enumerate(self._stages) if any(spec.name in changed for spec in stage.weights()) or i + 1 == len(self._stages)
        )
        x = self._streams[first]
        for stage in self._stages[first:]:
            x = self._run(stage, x, changed)
        return float(np.mean(token_divergence(self._reference, self._logits(x, changed))))

    def _run(self, stage: Stage, x: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
        return stage.run({spec.name: self._weight(spec, changed) for spec in stage.weights()}, x)

    def _logits(self, x: Tensor, changed: Mapping[str, Tensor]) -> NDArray[np.float32]:
        (head,) = (node.weights["weight"] for node in self._graph.nodes if node.role is Role.LM_HEAD)
        return torch.nn.functional.linear(x.flatten(0, 1), self._weight(head, changed)).numpy()

    def _weight(self, spec: WeightSpec, changed: Mapping[str, Tensor]) -> Tensor:
        return changed[spec.name] if spec.name in changed else self._checkpoint.tensor(spec.name).to(torch.float32)
