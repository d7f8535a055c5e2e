"""Quantization grids: codes and parameters (scales, or table entries) of a matrix, as GPTQ changes them.

Matrices are transposed, `[in, out]`. Parameters are float32 `[parameters, systems]`: a system is what shares no parameter with the rest, a row
of the weight for scales, a group of rows for tables. Values are linear in the parameters, which is what lets least squares fit them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elmexport.quantization.codec import Quantized


class Grid(ABC):
    """Codes of a matrix, and the parameters that give them values; `Quantized.grid` starts one."""

    parameters: Tensor

    @abstractmethod
    def round(self, column: int, target: Tensor) -> Tensor:
        """Give input channel `column` the codes nearest to `target` `[out]`; returns their values `[out]`."""

    @abstractmethod
    def expand(self, parameters: Tensor) -> Tensor:
        """The matrix `[in, out]` that the codes give with `parameters`."""

    @abstractmethod
    def reduce(self, matrix: Tensor) -> Tensor:
        """The transpose of `expand`: for each parameter, the sum over `matrix` `[in, out]` of what it contributes."""

    @abstractmethod
    def squares(self, diagonal: Tensor) -> Tensor:
        """For each parameter, the sum of the squares of what it contributes, weighted by `diagonal` `[in]`."""

    @abstractmethod
    def set(self, parameters: Tensor) -> None:
        """Take `parameters`, rounded to what is stored; those that do not fit stay as they were."""

    @abstractmethod
    def result(self) -> Quantized:
        """The matrix as it is now."""

    def fp16(self, parameters: Tensor) -> Tensor:
        """`parameters` rounded to fp16, those that overflow replaced by the present ones."""
        return finite_fp16(parameters, self.parameters).to(torch.float32)


def finite_fp16(values: Tensor, otherwise: Tensor) -> Tensor:
    """`values` rounded to float16; those that overflow are taken from `otherwise`."""
    rounded = values.to(torch.float16)
    return torch.where(torch.isfinite(rounded), rounded, otherwise)
