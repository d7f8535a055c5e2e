"""Loss of the next wider quantization of a format, measured on the text of the self-check.

No artifact is written for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.facts import rounded
from calibration.preparation import with_own_codes
from calibration.statistics import mean_square_of
from elmexport.checkpoint.base import Checkpoint
from elmexport.divergence import divergence
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.evaluation.self_check import ReferenceRun
from elmexport.graph.device import torch_device
from elmexport.graph.forward import KVCaches, Rows, forward
from elmexport.graph.ir import Graph
from elmexport.manifest import StepUp
from elmexport.progress import Progress
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan, resolve
from elmexport.quantization.schemes import CodedScheme, Float
from elmexport.quantization.weight_source import cast
from elmexport.target import Target
from elmexport.weights import WeightSpec

_WIDER = 1.05  # times the bits: less is no step
_LARGEST = 1_500_000_000  # parameters: to quantize a larger model once more takes minutes


def next_wider(target: Target, plan: Plan, checkpoint: Checkpoint) -> tuple[str, Plan] | None:
    """Find the quantization of `target` with the fewest bits above those of `plan`, its codes by this project; None where there is none.

    Look-up tables are passed over, for they take several times as long to find as an export takes.
    """
    found: list[tuple[float, str, Plan]] = []
    for quant in target.quants:
        try:
            other = resolve(with_own_codes(target.recipe(quant)), checkpoint.config)
        except MissingDependencyError:
            continue
        refused = any(target.refuses(other.schemes[name], spec.role) for name, spec in checkpoint.specs.items())
        slow = any(isinstance(scheme, CodedScheme) and scheme.is_slow for scheme in other.schemes.values())
        if other.bits_per_weight > _WIDER * plan.bits_per_weight and not refused and not slow:
            found.append((other.bits_per_weight, quant, other))
    return min(found, key=lambda entry: entry[0])[1:] if found else None


@torch.inference_mode()
def measure_step_up(
    target: Target, plan: Plan, checkpoint: Checkpoint, graph: Graph, reference: ReferenceRun, progress: Progress
) -> StepUp | None:
    """Measure the KL (nats per token, weights only) of `next_wider` on the ids of `reference`.

    Scales are searched quickly (`Rounding`), so what is found is a few percent above what an export would lose.

    None where there is none, and for models so large that it would cost minutes.
    """
    if checkpoint.config.parameter_count > _LARGEST:
        return None
    found = next_wider(target, plan, checkpoint)
    if found is None:
        return None
    quant, wider = found
    mean_square = mean_square_of(reference.statistics.moments)
    progress.stage(f"trying {quant}", sum(spec.size for node in graph.nodes for spec in node.weights.values()))

    def weight(spec: WeightSpec) -> Tensor | Rows:
        progress.advance(spec.size)
        stored, scheme = checkpoint.tensor(spec.name), wider.schemes[spec.name]
        if isinstance(scheme, Float):
            return cast(stored, scheme, spec.name)
        assert isinstance(scheme, CodedScheme)
        rows = _QuantizedRows(spec.name, stored, scheme, mean_square(spec))
        return rows[:] if spec.role.is_expert else rows

    caches = KVCaches(graph, context=len(reference.ids), device=torch_device())
    logits = forward(graph, weight, torch.from_numpy(reference.ids)[None], 0, caches)[0].numpy()
    return StepUp(quant, round(wider.bits_per_weight, 4), rounded(divergence(reference.logits, logits).kl_mean))


@dataclass(frozen=True)
class _QuantizedRows:
    """Rows of a matrix, quantized and dequantized as they are asked for: of an embedding, those of the text alone."""

    name: str
    stored: Tensor
    scheme: CodedScheme
    mean_square: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.stored.shape

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        try:
            return quantize(self.stored[rows], self.scheme, "quick", self.mean_square).dequantize()
        except ElmExportError as error:
            raise error.of(self.name) from None
