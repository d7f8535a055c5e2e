"""Sources of a model's weights as an artifact will hold them: read, quantized or cast one at a time, when they are asked for.

What a target asks is `WeightSource`. `CheckpointWeights` quantizes as it reads; `calibration.weight_set` has the source for codes that were
computed before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError, Fp16RangeError
from elmexport.quantization.codec import Quantized, Rounding
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme, Float, Scheme
from elmexport.weights import WeightSpec

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

MeanSquareOf = Callable[[WeightSpec], Tensor | None]
"""E[x²] of each input channel of a matrix, float32 `[in]`; None where nothing is known."""


@dataclass(frozen=True)
class Scaled:
    """A weight as it is stored, and the factor by which it has still to be multiplied: 1 where it could take all of what was asked for."""

    weight: Tensor | Quantized
    rest: float = 1.0


class WeightSource(ABC):
    """The weights of a checkpoint under a plan; nothing is kept of what was read."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self._checkpoint, self.plan = checkpoint, plan

    @property
    def specs(self) -> Mapping[str, WeightSpec]:
        """Every tensor of the model by name, in forward order."""
        return self._checkpoint.specs

    def scheme(self, spec: WeightSpec) -> Scheme:
        """Scheme that `spec` is stored in."""
        return self.plan.schemes[spec.name]

    def get(self, spec: WeightSpec) -> Tensor | Quantized:
        """Read the tensor as its scheme stores it, `[…, out, in]` or `[dim]`; one in a type that its target quantizes has no such form.

        Raises:
            ElmExportError: NaN or infinite weights, values beyond the scheme's range.
        """
        scheme = self.scheme(spec)
        if isinstance(scheme, Float):
            return cast(self.numbers(spec), scheme, spec.name)
        assert isinstance(scheme, CodedScheme), f"{spec.name}: {scheme} is quantized by the target, from `numbers`"
        return self._quantized(spec, scheme)

    def scaled(self, spec: WeightSpec, factor: float) -> Scaled:
        """Read the tensor times `factor`, a power of two, as far as its stored form takes it exactly. Floats take any, rounded to their dtype.

        Raises:
            ElmExportError: as `get`.
        """
        scheme = self.scheme(spec)
        if factor != 1.0 and isinstance(scheme, Float):
            return Scaled(cast(self.numbers(spec).to(torch.float32) * factor, scheme, spec.name))
        weight = self.get(spec)
        if factor == 1.0 or isinstance(weight, Tensor):
            return Scaled(weight)
        product = weight.scaled(factor)
        return Scaled(weight, factor) if product is None else Scaled(product)

    def numbers(self, spec: WeightSpec) -> Tensor:
        """Read the tensor's own values, in the checkpoint's dtype: for types that the target quantizes itself.

        Raises:
            ElmExportError: NaN or infinite weights.
        """
        return self._checkpoint.tensor(spec.name)

    @abstractmethod
    def _quantized(self, spec: WeightSpec, scheme: CodedScheme) -> Quantized:
        """The tensor in codes of `scheme`, which is that of the plan."""


class CheckpointWeights(WeightSource):
    """Weights quantized as they are read, each by itself.

    `mean_square` weights the squared errors of "mse" by the input of a matrix (for a tied embedding, by that of the head).
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, method: Rounding = "mse", mean_square: MeanSquareOf | None = None) -> None:
        super().__init__(checkpoint, plan)
        self._method, self._mean_square = method, mean_square

    def _quantized(self, spec: WeightSpec, scheme: CodedScheme) -> Quantized:
        weight = self.numbers(spec)
        mean_square = None if self._mean_square is None else self._mean_square(spec)
        try:
            return quantize(weight, scheme, self._method, mean_square)
        except ElmExportError as error:
            raise error.of(spec.name) from None


def cast(tensor: Tensor, scheme: Float, name: str) -> Tensor:
    """Convert `tensor` to the dtype of `scheme`.

    Raises:
        ElmExportError: a value overflows the dtype.
    """
    result = tensor.to(TORCH_DTYPES[scheme.dtype])
    if scheme.dtype == "fp16" and not torch.isfinite(result).all():
        rows = torch.nonzero(~torch.isfinite(result).reshape(len(result), -1).all(dim=1)).flatten()
        where = "" if result.dim() < 2 else f" in row {int(rows[0])}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
        raise Fp16RangeError(
            f"{name} reaches {float(tensor.abs().max()):.4g}{where}, beyond fp16's 65504", "export with bf16 or fp32 weights"
        )
    return result
