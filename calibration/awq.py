"""AWQ scales: factors on input channels that let those with large activations be rounded more finely (Lin et al., "AWQ", 2023).

The scale of a channel is the root mean square of its activations to the power of an exponent, searched for each linear so that rounding costs the
least output error under the scheme at hand. (The paper takes the mean magnitude, and searches clipping afterwards; here scales of
least squared error clip within each trial.) Matrices that read the same norm share one scale, searched on all of them together: queries, keys and
values where they are separate; gate and up of all experts of a mixture, each counted by the tokens that went to it. What the scales are folded
into is `calibration.folding`'s part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.folding import FoldedCheckpoint, Folds, LayerFold, folded_moments, for_query_heads, has_gate
from calibration.gptq import output_error
from calibration.statistics import Moments, Statistics
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.graph.device import torch_device
from elmexport.quantization.codec import find_codec
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme, Scheme
from elmexport.weights import Role, WeightSpec

_EXPONENTS = tuple(i / 10 for i in range(11))
_SMALLEST = 1e-4  # of the largest activation: what a silent channel counts as
_ROWS = 512  # output channels, evenly spread over all that share a scale, on which an exponent is judged

_FIELDS = {
    Role.ATTENTION_QKV: "qkv",
    Role.ATTENTION_Q: "qkv",
    Role.ATTENTION_K: "qkv",
    Role.ATTENTION_V: "qkv",
    Role.ATTENTION_OUT: "out",
    Role.FFN_GATE_UP: "gate_up",
    Role.FFN_UP: "gate_up",
    Role.FFN_DOWN: "down",
    Role.MOE_EXPERTS_GATE: "gate_up",
    Role.MOE_EXPERTS_UP: "gate_up",
    Role.MOE_EXPERTS_DOWN: "down",
}


def awq_model(checkpoint: Checkpoint, plan: Plan, statistics: Statistics) -> FoldedCheckpoint:
    """Rescale the input channels of `checkpoint` for the schemes of `plan`; see `awq_folds`."""
    return FoldedCheckpoint(checkpoint, awq_folds(checkpoint, lambda spec: plan.schemes[spec.name], statistics))


def awq_folds(checkpoint: Checkpoint, scheme: Callable[[WeightSpec], Scheme], statistics: Statistics) -> Folds:
    """Search the folds of least output error for every linear that `scheme` quantizes, for `FoldedCheckpoint`.

    Weights are read one at a time. An expert that no token reached has no say.

    Raises:
        ElmExportError: statistics without a linear of the model.
    """
    dims, device = checkpoint.config.dims, torch_device()

    def moments_of(spec: WeightSpec) -> Moments:
        moments = statistics.moments(spec)
        if moments is None:
            raise ElmExportError(f"the calibration statistics lack {spec.name}; make them for this model with `elmexport calibrate`")
        return moments

    found: dict[int, dict[str, Tensor]] = {}
    for (layer, name, expert), matrices in _sharing(checkpoint, scheme).items():
        # One at a time: with Hessians, the moments of all experts would be gigabytes.
        known = [(moments.tokens, moments.mean_square) for moments in map(moments_of, matrices)]
        total = sum(tokens for tokens, _ in known)
        parts = [tokens / total if total else 1 / len(known) for tokens, _ in known]  # an importance matrix may not say how many
        mean_square = torch.stack([part * square for part, (_, square) in zip(parts, known, strict=True)]).sum(0).to(device)
        shared = torch.arange(len(mean_square), device=device)
        if name == "out":
            shared = for_query_heads(torch.arange(dims.layers[layer].kv_heads * dims.head_dim, device=device), dims, layer)
        scale = _search(mean_square, _readers(checkpoint, matrices, parts, moments_of), shared)
        if scale is None:
            continue
        fold = found.setdefault(layer, {})
        if expert is None:
            fold[name] = scale.cpu()
        else:
            fold.setdefault(name, torch.ones(dims.layers[layer].experts, len(scale)))[expert] = scale.cpu()
    return {layer: LayerFold(**fold) for layer, fold in found.items()}


def awq_scale(weight: Tensor, scheme: CodedScheme, moments: Moments, shared: Tensor | None = None) -> Tensor | None:
    """Search the AWQ scales of one matrix: by what to multiply the columns of `weight` `[out, in]` before `scheme` rounds it.

    Returns float32 `[in]`; None where nothing helps. Judged by the output error under the Hessian, or under the mean squares where there is
    none. `shared` (int64 `[in]`) says which scale each
    column takes, where columns cannot have their own; the result is then `[largest of shared + 1]`.

    Raises:
        ElmExportError: the weight does not fit the scheme.
    """
    shared = torch.arange(weight.shape[1], device=weight.device) if shared is None else shared
    return _search(moments.mean_square, [_Reader(weight, scheme, moments)], shared)


@dataclass(frozen=True)
class _Reader:
    """One of the matrices that share a scale: `weight` `[out, in]`, and the moments of what it reads."""

    weight: Tensor
    scheme: CodedScheme
    moments: Moments
    part: float = 1.0  # of the tokens that all of them read
    rows: int = _ROWS  # that judge


def _sharing(
    checkpoint: Checkpoint, scheme: Callable[[WeightSpec], Scheme]
) -> dict[tuple[int, str, int | None], dict[WeightSpec, CodedScheme]]:
    """Group the matrices that `scheme` quantizes by the scale that they share: of a layer, a field of `LayerFold`, and an expert if it is its own."""
    found: dict[tuple[int, str, int | None], dict[WeightSpec, CodedScheme]] = {}
    for spec in checkpoint.specs.values():
        chosen, name = scheme(spec), _FIELDS.get(spec.role)
        if name is None or spec.layer is None or not isinstance(chosen, CodedScheme):
            continue
        if name == "down" and not has_gate(checkpoint, spec.layer):
            continue
        found.setdefault((spec.layer, name, spec.expert if name == "down" else None), {})[spec] = chosen
    return found


def _readers(
    checkpoint: Checkpoint, matrices: Mapping[WeightSpec, CodedScheme], parts: Sequence[float], moments_of: Callable[[WeightSpec], Moments]
) -> Iterator[_Reader]:
    """Read `matrices` one after the other, but for those whose part of the tokens is 0; rows that judge are in proportion to their own."""
    device, rows = torch_device(), sum(spec.shape[0] for spec in matrices)
    for (spec, chosen), part in zip(matrices.items(), parts, strict=True):
        if part:
            weight, moments = checkpoint.tensor(spec.name).to(device), moments_of(spec).to(device)
            yield _Reader(weight, chosen, moments, part, _ROWS * spec.shape[0] // rows)


def _search(mean_square: Tensor, readers: Iterable[_Reader], shared: Tensor) -> Tensor | None:
    """Search the scales that cost `readers` the least error together; `mean_square` `[in]` is E[x²] over all that they read. See `awq_scale`."""
    sums = mean_square.new_zeros(int(shared.max()) + 1).index_add_(0, shared, mean_square)
    size = (sums / torch.bincount(shared)).sqrt()
    if size.max() == 0:
        return None
    size = size.clamp(min=_SMALLEST * float(size.max()))
    scales = [scale / scale.log().mean().exp() for scale in map(size.pow, _EXPONENTS)]
    costs = [0.0] * len(scales)
    for reader in readers:
        scheme, moments = reader.scheme, reader.moments
        find_codec(scheme).check(reader.weight)
        sample = _rows(reader.weight, scheme, reader.rows).to(torch.float32)
        for number, scale in enumerate(scales):
            columns = scale[shared]
            rounded = quantize(sample * columns, scheme, "mse", folded_moments(moments, columns).mean_square).dequantize()
            error = sample - rounded / columns
            full = moments.hessian
            costs[number] += reader.part * (
                output_error(error, full) if full is not None else float((error.square() @ moments.mean_square).sum())
            )
    best = costs.index(min(costs))
    return scales[best] if best else None


def _rows(weight: Tensor, scheme: CodedScheme, limit: int) -> Tensor:
    """At most about `limit` rows of `weight`, whole groups where rows share a table."""
    unit = scheme.row_group
    groups = len(weight) // unit
    chosen = torch.linspace(0, groups - 1, min(groups, max(1, limit // unit))).round().to(torch.int64)
    return weight.view(groups, unit, -1)[chosen.to(weight.device)].reshape(-1, weight.shape[1])
