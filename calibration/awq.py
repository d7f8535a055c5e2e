"""AWQ scales: factors on input channels that let those with large activations be rounded more finely (Lin et al., "AWQ", 2023).

The scale of a channel is the root mean square of its activations to the power of an exponent, searched for each linear so that rounding costs the
least output error under the scheme at hand. (The paper takes the mean magnitude, and searches clipping afterwards; here scales of
least squared error clip within each trial.) What the scales are folded into is `calibration.folding`'s part.
"""

from __future__ import annotations

from collections.abc import Callable

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
_ROWS = 512  # output channels, evenly spread, on which an exponent is judged

_FIELDS = {Role.ATTENTION_QKV: "qkv", Role.ATTENTION_OUT: "out", Role.FFN_GATE_UP: "gate_up", Role.FFN_UP: "gate_up", Role.FFN_DOWN: "down"}


def awq_model(checkpoint: Checkpoint, plan: Plan, statistics: Statistics) -> FoldedCheckpoint:
    """Rescale the input channels of `checkpoint` for the schemes of `plan`; see `awq_folds`."""
    return FoldedCheckpoint(checkpoint, awq_folds(checkpoint, lambda spec: plan.schemes[spec.name], statistics))


def awq_folds(checkpoint: Checkpoint, scheme: Callable[[WeightSpec], Scheme], statistics: Statistics) -> Folds:
    """Search the folds of least output error for every linear that `scheme` quantizes, for `FoldedCheckpoint`.

    Weights are read one at a time.

    Raises:
        ElmExportError: statistics without a linear of the model.
    """
    dims, device = checkpoint.config.dims, torch_device()
    found: dict[int, dict[str, Tensor]] = {}
    for spec in checkpoint.specs.values():
        chosen, name = scheme(spec), _FIELDS.get(spec.role)
        if name is None or spec.layer is None or not isinstance(chosen, CodedScheme):
            continue
        if name == "down" and not has_gate(checkpoint, spec.layer):
            continue
        moments = statistics.moments(spec)
        if moments is None:
            raise ElmExportError(f"the calibration statistics lack {spec.name}; make them for this model with `elmexport calibrate`")
        shared = None
        if name == "out":
            scales = dims.layers[spec.layer].kv_heads * dims.head_dim
            shared = for_query_heads(torch.arange(scales, device=device), dims, spec.layer)
        scale = awq_scale(checkpoint.tensor(spec.name).to(device), chosen, moments.to(device), shared)
        if scale is not None:
            found.setdefault(spec.layer, {})[name] = scale.cpu()
    return {layer: LayerFold(**fold) for layer, fold in found.items()}


def awq_scale(weight: Tensor, scheme: CodedScheme, moments: Moments, shared: Tensor | None = None) -> Tensor | None:
    """Search the AWQ scales of one matrix: by what to multiply the columns of `weight` `[out, in]` before `scheme` rounds it.

    Returns float32 `[in]`; None where nothing helps. Judged by the output error under the Hessian, or under the mean squares where there is
    none. `shared` (int64 `[in]`) says which scale each
    column takes, where columns cannot have their own; the result is then `[largest of shared + 1]`.

    Raises:
        ElmExportError: the weight does not fit the scheme.
    """
    find_codec(scheme).check(weight)
    shared = torch.arange(weight.shape[1], device=weight.device) if shared is None else shared
    sums = moments.mean_square.new_zeros(int(shared.max()) + 1).index_add_(0, shared, moments.mean_square)
    size = (sums / torch.bincount(shared)).sqrt()
    if size.max() == 0:
        return None
    size = size.clamp(min=_SMALLEST * float(size.max()))
    sample = _rows(weight, scheme).to(torch.float32)
    best, least = None, torch.inf
    for exponent in _EXPONENTS:
        scale = size.pow(exponent)
        scale = scale / scale.log().mean().exp()
        columns = scale[shared]
        error = sample - quantize(sample * columns, scheme, "mse", folded_moments(moments, columns).mean_square).dequantize() / columns
        cost = output_error(error, moments.hessian) if moments.hessian is not None else float((error.square() @ moments.mean_square).sum())
        if cost < least:
            best, least = (scale if exponent else None), cost
    return best


def _rows(weight: Tensor, scheme: CodedScheme) -> Tensor:
    """At most about `_ROWS` rows of `weight`, whole groups where rows share a table."""
    unit = scheme.row_group
    groups = len(weight) // unit
    chosen = torch.linspace(0, groups - 1, min(groups, max(1, _ROWS // unit))).round().to(torch.int64)
    return weight.view(groups, unit, -1)[chosen.to(weight.device)].reshape(-1, weight.shape[1])
