"""Contract of a codec: quantization to a kind of scheme, storing, and reading back.

Each `CodedScheme` names its codec. Nothing outside the codec's module, and the targets that can hold its tensors, knows how a
scheme represents numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Self

import torch
from torch import Tensor

from elmexport.errors import ElmExportError, Fp16RangeError
from elmexport.quantization.grids import Grid
from elmexport.quantization.schemes import CodedScheme

Rounding = Literal["mse", "rtn", "quick"]
"""How codes are found from the weight alone: "rtn" rounds to nearest, "mse" searches parameters of least squared error, "quick" searches
fewer of them, for measurements that no artifact comes of: its squared error is a few percent larger."""

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Part:
    """Type and shape of one tensor of those that store a quantized tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Quantized(ABC):
    """A weight as codes and parameters. Subclasses are frozen dataclasses.

    `codes` are integers `[…, out, in]`, one for each value, not packed; `scheme` says what they mean.
    """

    scheme: CodedScheme
    codes: Tensor

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The values, float32 `[…, out, in]`."""

    @abstractmethod
    def scaled(self, factor: float) -> Self | None:
        """The tensor times a power of two, exactly; None where its parameters would overflow, or lose bits to underflow."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors that store it, of the types and shapes of `Codec.layout`; codes are packed."""

    @abstractmethod
    def grid(self) -> Grid:
        """The codes and parameters of a matrix `[out, in]` as GPTQ changes them, beginning with these."""

    @property
    def parameters(self) -> Tensor | None:
        """Scales or table entries, float16, in which values are linear; None where they are not free to change a little."""
        return None

    def with_parameters(self, parameters: Tensor) -> Self:
        """The same codes with other `parameters`, of any float dtype, rounded to float16; those that overflow stay as they are."""
        raise NotImplementedError(f"{self.scheme} has no parameters to change")

    def parameter_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient by the parameters of a matrix, float32 in their shape, of what has `gradient` float32 `[out, in]` by the values."""
        return self.grid().reduce(gradient.t().contiguous()).t()


class Codec(ABC):
    """Quantization to one scheme of a kind."""

    def __init__(self, scheme: CodedScheme) -> None:
        self.scheme = scheme

    @abstractmethod
    def quantize(self, weight: Tensor, method: Rounding, importance: Tensor | None) -> Quantized:
        """Quantize `weight` `[…, out, in]` (any float dtype), which has passed `check`.

        `importance` float32 `[in]`, its mean 1, weights the squared errors of "mse".

        Raises:
            ElmExportError: the scheme has no such `method`.
        """

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """The tensors that store a tensor of `shape`, by name, in the order in which files hold them."""

    @abstractmethod
    def from_parts(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Quantized:
        """The tensor of `shape` that `parts`, of the types and shapes of `layout`, store: the inverse of `Quantized.parts`.

        Raises:
            ElmExportError: codes that stand for no value.
        """

    @abstractmethod
    def beyond(self, low: float, high: float) -> str | None:
        """Reason why values from `low` to `high` (finite or not) cannot be represented, as a clause; None where they can."""

    def check(self, weight: Tensor) -> None:
        """Refuse a weight that the scheme cannot hold.

        Raises:
            ElmExportError: the shape does not fit the scheme, or values are out of its range.
        """
        reason = self.scheme.refuses(tuple(weight.shape))
        if reason is not None:
            raise ElmExportError(f"a tensor of shape {list(weight.shape)} cannot be quantized to {self.scheme}: {reason}")
        # Checked before a search: it would take an overflowing scale for a bad candidate, and end at zero.
        reason = self.beyond(*(float(end) for end in weight.aminmax()))
        if reason is not None:
            raise Fp16RangeError(reason, "export this checkpoint in a float format")


def find_codec(scheme: CodedScheme) -> Codec:
    """The codec of `scheme`."""
    module, _, name = scheme.codec.partition(":")
    kind: type[Codec] = getattr(import_module(module), name)
    return kind(scheme)


def beyond_fp16(largest: float, reach: float, what: str) -> str | None:
    """The clause for `Codec.beyond` where a `largest` magnitude above `reach` makes `what` ("a scale") leave fp16."""
    if largest <= reach:
        return None
    return f"the largest weight, {largest:.3g}, needs {what} that exceeds fp16's 65504 (codes reach {reach:.3g})"


def fp16_times(values: Tensor, factor: float) -> Tensor | None:
    """Float16 `values` times `factor`, None where the product is no float16 number."""
    product = values.to(torch.float32) * factor
    rounded = product.to(torch.float16)
    return rounded if torch.equal(rounded.to(torch.float32), product) else None
