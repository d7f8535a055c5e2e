"""Folding of scales: a linear's input channels are rescaled, and what produces them takes the inverse. Only weights change.

For a linear W and a positive scale s per input channel, W' = W diag(s) on inputs x' = x / s gives the same output. Where x comes from

- a norm (inputs of `attention.qkv` and `ffn.gate_up`), the norm's weight is divided by s. Every matrix that reads the norm has the same s: queries,
  keys and values where they are separate, and in a mixture the gate and up of all experts and the router, which so sends tokens where it did;
- `silu(gate) * up` (inputs of `ffn.down`, of each expert in a mixture), the rows of `up` are: the product is linear in them;
- attention (inputs of `attention.out`), the rows of the values are: no norm comes between. A channel of a KV head reaches `out` through every
  query head that reads that KV head, so it has one scale: s is given for `[KV heads * head_dim]`.

The head cannot be folded: its norm feeds nothing else, but it is the embedding, whose rows enter the stream as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.graph.dims import ModelDims
from elmexport.progress import Progress
from elmexport.weights import Role, WeightSpec

if TYPE_CHECKING:
    from calibration.statistics import Moments

_FP16_NORMAL = (2.0**-14, 65504.0)  # a folded norm stays within: smaller numbers have fewer bits, larger ones are none


@dataclass(frozen=True)
class LayerFold:
    """Scales of one layer's inputs, float32, positive; None where nothing is folded. The weight's column is multiplied by its scale.

    `qkv` `[D]`, `gate_up` `[D]`, `down` `[ffn width]` (of a mixture `[experts, ffn width]`), `out` `[KV heads * head_dim]`.
    """

    qkv: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None
    out: Tensor | None = None


Folds = Mapping[int, LayerFold]  # by layer; layers that are absent are left alone


class FoldedCheckpoint(Checkpoint):
    """Checkpoint with folds applied to each tensor as it is read: the same function, other weights.

    Tensors that a fold touches come as float32, others as they are stored. Scales of norms are adjusted by less than 2^-11 so that the
    folded norm is a number of fp16, which every format stores without rounding; a channel whose norm would leave fp16's normal numbers, or
    is zero, is not folded. So norms lose nothing, and the columns, which take the exact quotient of the norms, are rounded in float32 only.
    """

    def __init__(self, checkpoint: Checkpoint, folds: Folds) -> None:
        """
        Raises:
            ElmExportError: a fold for a layer that does not exist or of a wrong length, a scale that is not positive and finite, or
                `down` in a model without a gate.
        """
        super().__init__(checkpoint.config, checkpoint.source, checkpoint.tokenizer_path)
        self._checkpoint = checkpoint
        _check(checkpoint, folds)
        self._folds = {layer: self._settled(layer, fold) for layer, fold in folds.items()}

    def input_scale(self, spec: WeightSpec) -> Tensor | None:
        """Factors of the columns of `spec`, float32 `[in]`; None where it has none."""
        fold = None if spec.layer is None else self._folds.get(spec.layer)
        if fold is None or spec.layer is None:
            return None
        match spec.role:
            case Role.ATTENTION_QKV | Role.ATTENTION_Q | Role.ATTENTION_K | Role.ATTENTION_V:
                return fold.qkv
            case Role.FFN_GATE_UP | Role.FFN_UP | Role.MOE_ROUTER | Role.MOE_EXPERTS_GATE | Role.MOE_EXPERTS_UP:
                return fold.gate_up
            case Role.FFN_DOWN:
                return fold.down
            case Role.MOE_EXPERTS_DOWN:
                return None if fold.down is None else fold.down[spec.expert]
            case Role.ATTENTION_OUT:
                return None if fold.out is None else for_query_heads(fold.out, self.config.dims, spec.layer)
        return None

    def moments(self, spec: WeightSpec, moments: Moments) -> Moments:
        """`moments` of the inputs that `spec` reads in the folded model, from those of the original one."""
        scale = self.input_scale(spec)
        return moments if scale is None else folded_moments(moments, scale)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._checkpoint.stored_shapes()

    def read(self, name: str) -> Tensor:
        tensor, spec = self._checkpoint.read(name), self.specs[name]
        columns, rows = self.input_scale(spec), self._output_scale(spec)
        if columns is not None:
            tensor = tensor.to(torch.float32) * columns
        if rows is None:
            return tensor
        tensor = tensor.to(torch.float32)
        if spec.role.is_norm:
            # The division is within a rounding of float32 of the number of fp16 that the scale was adjusted to.
            return torch.where(rows == 1, tensor, (tensor / rows).to(torch.float16).to(torch.float32))
        return tensor / rows[:, None]

    def identity(self, progress: Progress | None = None) -> str:
        digest = hashlib.sha256(self._checkpoint.identity(progress).encode())
        for layer, fold in sorted(self._folds.items()):
            for field in fields(fold):
                scale = getattr(fold, field.name)
                if scale is not None:
                    digest.update(f"{layer} {field.name}\n".encode() + scale.numpy().tobytes())
        return digest.hexdigest()

    def _output_scale(self, spec: WeightSpec) -> Tensor | None:
        """What the rows of `spec` (the values of a norm) are divided by, float32 `[out]`."""
        fold = None if spec.layer is None else self._folds.get(spec.layer)
        if fold is None or spec.layer is None:
            return None
        dims = self.config.dims
        layer = dims.layers[spec.layer]
        match spec.role:
            case Role.NORM_ATTENTION:
                return fold.qkv
            case Role.NORM_FFN:
                return fold.gate_up
            case Role.FFN_GATE_UP if fold.down is not None:
                return torch.cat((torch.ones(layer.ffn_dim), fold.down))
            case Role.MOE_EXPERTS_UP if fold.down is not None:
                return fold.down[spec.expert]
            case Role.ATTENTION_V:
                return fold.out
            case Role.ATTENTION_QKV if fold.out is not None:
                return torch.cat((torch.ones((layer.query_heads + layer.kv_heads) * dims.head_dim), fold.out))
        return None

    def _settled(self, layer: int, fold: LayerFold) -> LayerFold:
        """`fold` with the scales of its norms adjusted."""
        norms = {spec.role: spec.name for spec in self.specs.values() if spec.layer == layer and spec.role.is_norm}
        return LayerFold(
            None if fold.qkv is None else self._for_norm(norms[Role.NORM_ATTENTION], fold.qkv),
            None if fold.gate_up is None else self._for_norm(norms[Role.NORM_FFN], fold.gate_up),
            None if fold.down is None else fold.down.to(torch.float32),
            None if fold.out is None else fold.out.to(torch.float32),
        )

    def _for_norm(self, name: str, scale: Tensor) -> Tensor:
        norm = self._checkpoint.tensor(name).to(torch.float32)
        folded = (norm / scale.to(torch.float32)).to(torch.float16).to(torch.float32)
        low, high = _FP16_NORMAL
        usable = (folded.abs() >= low) & (folded.abs() <= high)
        return torch.where(usable, norm / folded, 1.0)


def for_query_heads(scale: Tensor, dims: ModelDims, layer: int) -> Tensor:
    """Expand the scales of `out`'s input channels `[query heads * head_dim]` from those of the KV heads `[KV heads * head_dim]`."""
    return scale.view(dims.layers[layer].kv_heads, 1, dims.head_dim).expand(-1, dims.layers[layer].queries_per_kv_head, -1).reshape(-1)


def folded_moments(moments: Moments, scale: Tensor) -> Moments:
    """Compute the moments of x / `scale` from those of x."""
    from calibration.statistics import Moments

    hessian = None if moments.hessian is None else moments.hessian / scale / scale[:, None]
    mean_abs = None if moments.mean_abs is None else moments.mean_abs / scale
    return Moments(moments.tokens, moments.mean_square / scale.square(), mean_abs, hessian)


def has_gate(checkpoint: Checkpoint, layer: int) -> bool:
    """Whether the feed-forward network of `layer` is a gated one, as experts' are, whose product is linear in `up`."""
    return any(spec.layer == layer and spec.role in (Role.FFN_GATE_UP, Role.MOE_EXPERTS_GATE) for spec in checkpoint.specs.values())


def _check(checkpoint: Checkpoint, folds: Folds) -> None:
    dims = checkpoint.config.dims
    for layer, fold in folds.items():
        if not 0 <= layer < len(dims.layers):
            raise ElmExportError(f"a fold names layer {layer}; the model has layers 0 to {len(dims.layers) - 1}")
        if fold.down is not None and not has_gate(checkpoint, layer):
            raise ElmExportError("the inputs of ffn.down cannot be rescaled in a model without a gate")
        sizes = dims.layers[layer]
        down = (sizes.experts, sizes.ffn_dim) if sizes.experts else (sizes.ffn_dim,)
        shapes = {"qkv": (dims.model_dim,), "gate_up": (dims.model_dim,), "down": down, "out": (sizes.kv_heads * dims.head_dim,)}
        for name, shape in shapes.items():
            scale = getattr(fold, name)
            if scale is None:
                continue
            if scale.shape != shape:
                raise ElmExportError(f"layer {layer}: the scales of {name} have the shape {list(scale.shape)}; it takes {list(shape)}")
            if not (torch.isfinite(scale).all() and (scale > 0).all()):
                raise ElmExportError(
                    f"layer {layer}: the scales of {name} must be finite and above 0; they run from {float(scale.min()):.3g}"
                )
