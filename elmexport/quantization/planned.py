"""A checkpoint's weights in the form that an artifact will hold: each tensor read, quantized or cast when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.quantization.codec import Quantized, Rounding
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme, Float, Scheme
from elmexport.weights import WeightSpec

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Quantizer(Protocol):
    """Gives the tensors that a plan stores as codes."""

    def __call__(self, weight: Tensor, spec: WeightSpec, scheme: CodedScheme) -> Quantized: ...


class PlannedWeights:
    """Streams the weights of `checkpoint` under `plan`; nothing is kept.

    Codes come from `quantizer`; where None, from `quantize` with its default method. `norms` stand in the place of the checkpoint's.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, quantizer: Quantizer | None = None, norms: Mapping[str, Tensor] | None = None
    ) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        self._quantizer, self._norms = quantizer or OnTheFly(), norms or {}

    def scheme(self, spec: WeightSpec) -> Scheme:
        return self.plan.schemes[spec.name]

    def get(self, spec: WeightSpec, scale: float = 1.0) -> Tensor | Quantized:
        """The tensor times `scale` (a power of two), as its scheme stores it: `[out, in]` or `[dim]`.

        Raises:
            ElmExportError: NaN or infinite weights, values beyond the scheme's range.
        """
        tensor = self._norms[spec.name] if spec.name in self._norms else self.checkpoint.tensor(spec.name)
        scheme = self.scheme(spec)
        if isinstance(scheme, Float):
            return cast(tensor if scale == 1.0 else tensor.to(torch.float32) * scale, scheme, spec.name)
        assert isinstance(scheme, CodedScheme), f"{spec.name}: {scheme} is quantized by the target"
        try:
            quantized = self._quantizer(tensor, spec, scheme)
        except ElmExportError as error:
            raise ElmExportError(f"{spec.name}: {error}") from None
        scaled = quantized if scale == 1.0 else quantized.scaled(scale)
        if scaled is None:
            raise ElmExportError(f"{spec.name} cannot be multiplied by {scale:g} exactly in fp16")
        return scaled


class OnTheFly:
    """`quantize` by `method`, its squares weighted by the mean squares of a tensor's input where given (those of the head for a tied embedding)."""

    def __init__(self, method: Rounding = "mse", mean_square: Callable[[WeightSpec], Tensor | None] | None = None) -> None:
        self._method, self._mean_square = method, mean_square

    def __call__(self, weight: Tensor, spec: WeightSpec, scheme: CodedScheme) -> Quantized:
        return quantize(weight, scheme, self._method, None if self._mean_square is None else self._mean_square(spec))


def cast(tensor: Tensor, scheme: Float, name: str) -> Tensor:
    """`tensor` in the dtype of `scheme`.

    Raises:
        ElmExportError: a value overflows the dtype.
    """
    result = tensor.to(TORCH_DTYPES[scheme.dtype])
    if scheme.dtype == "fp16" and not torch.isfinite(result).all():
        raise ElmExportError(f"{name} reaches {float(tensor.abs().max()):.4g}, beyond fp16's 65504; export with bf16 or fp32 weights")
    return result
