"""A checkpoint's weights in the form that an artifact will hold: each tensor read, quantized or cast when it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.quantization.quantize import QuantizedTensor, quantize
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import Float, Scheme
from elmexport.weights import WeightSpec

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PlannedWeights:
    """Streams the weights of `checkpoint` under `plan`; nothing is kept."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self.checkpoint, self.plan = checkpoint, plan

    def scheme(self, spec: WeightSpec) -> Scheme:
        return self.plan.schemes[spec.name]

    def get(self, spec: WeightSpec, scale: float = 1.0) -> Tensor | QuantizedTensor:
        """The tensor times `scale` (a power of two), as its scheme stores it: `[out, in]` or `[dim]`.

        Raises:
            ElmExportError: NaN or infinite weights, values beyond the scheme's range.
        """
        tensor = self.checkpoint.tensor(spec.name)
        scheme = self.scheme(spec)
        if isinstance(scheme, Float):
            return cast(tensor if scale == 1.0 else tensor.to(torch.float32) * scale, scheme, spec.name)
        try:
            quantized = quantize(tensor, scheme)
            return quantized if scale == 1.0 else quantized.scaled(scale)
        except ElmExportError as error:
            raise ElmExportError(f"{spec.name}: {error}") from None


def cast(tensor: Tensor, scheme: Float, name: str) -> Tensor:
    """`tensor` in the dtype of `scheme`.

    Raises:
        ElmExportError: a value overflows the dtype.
    """
    result = tensor.to(TORCH_DTYPES[scheme.dtype])
    if scheme.dtype == "fp16" and not torch.isfinite(result).all():
        raise ElmExportError(f"{name} reaches {float(tensor.abs().max()):.4g}, beyond fp16's 65504; export with bf16 or fp32 weights")
    return result
