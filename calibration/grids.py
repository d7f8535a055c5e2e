"""What GPTQ rounds to: the codes and parameters (scales, or table entries) of a matrix under construction.

Matrices are transposed, `[in, out]`. Parameters are float32 `[parameters, systems]`: a system is what shares no parameter with the rest, a row
of the weight for scales, a group of rows for tables. Values are linear in the parameters, which is what lets least squares fit them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from elmexport.quantization.lut import boundaries
from elmexport.quantization.quantize import PalettizedTensor, QuantizedTensor


class Grid(ABC):
    """Codes of a matrix, and the parameters that give them values; starts from those of a quantized tensor."""

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
        """Take `parameters`, rounded to fp16; those that do not fit stay as they were."""

    @abstractmethod
    def result(self) -> QuantizedTensor | PalettizedTensor: ...

    def _rounded(self, parameters: Tensor) -> Tensor:
        rounded = parameters.to(torch.float16).to(torch.float32)
        return torch.where(torch.isfinite(rounded), rounded, self.parameters)


class IntegerGrid(Grid):
    """Parameters are scales, `[granules, out]`."""

    def __init__(self, start: QuantizedTensor) -> None:
        self.scheme = start.scheme
        self.low, self.high = self.scheme.range
        self.parameters = start.scales.t().to(torch.float32).contiguous()
        self.block = start.codes.shape[1] // len(self.parameters)
        self.zeros = torch.zeros(1) if start.zeros is None else start.zeros.t().to(torch.float32).contiguous()
        self.offsets = start.codes.t().to(torch.float32)  # codes less zero points
        if start.zeros is not None:
            self.offsets -= self.zeros.repeat_interleave(self.block, 0)
        self.offsets = self.offsets.contiguous()
        self._invert()

    def round(self, column: int, target: Tensor) -> Tensor:
        granule = column // self.block
        codes = torch.mul(target, self.inverse[granule], out=self.offsets[column])
        if self.scheme.symmetric:
            codes.round_().clamp_(self.low, self.high)
        else:
            codes.round_().add_(self.zeros[granule]).clamp_(self.low, self.high).sub_(self.zeros[granule])
        return codes * self.parameters[granule]

    def expand(self, parameters: Tensor) -> Tensor:
        return (self._blocks(self.offsets) * parameters[:, None]).view(self.offsets.shape)

    def reduce(self, matrix: Tensor) -> Tensor:
        return (self._blocks(matrix) * self._blocks(self.offsets)).sum(1)

    def squares(self, diagonal: Tensor) -> Tensor:
        return (self._blocks(self.offsets).square() * diagonal.view(-1, self.block, 1)).sum(1)

    def set(self, parameters: Tensor) -> None:
        self.parameters = self._rounded(parameters)
        self._invert()

    def result(self) -> QuantizedTensor:
        if self.scheme.symmetric:
            return QuantizedTensor(self.scheme, self.offsets.t().to(torch.int8).contiguous(), self._scales())
        codes = self.offsets + self.zeros.repeat_interleave(self.block, 0)
        zeros = self.zeros.t().to(torch.int8).contiguous()
        return QuantizedTensor(self.scheme, codes.t().to(torch.int8).contiguous(), self._scales(), zeros)

    def _scales(self) -> Tensor:
        return self.parameters.t().to(torch.float16).contiguous()

    def _blocks(self, matrix: Tensor) -> Tensor:
        return matrix.view(len(self.parameters), self.block, -1)

    def _invert(self) -> None:
        self.inverse = torch.where(self.parameters == 0, 0.0, self.parameters.reciprocal())


class TableGrid(Grid):
    """Parameters are table entries, `[entries, groups]`."""

    def __init__(self, start: PalettizedTensor) -> None:
        self.scheme = start.scheme
        self.parameters = start.tables.t().to(torch.float32)
        self.codes = start.codes.t().to(torch.int64).contiguous()
        self.rows = self.codes.shape[1] // self.parameters.shape[1]  # of a group
        self._sort()

    def round(self, column: int, target: Tensor) -> Tensor:
        codes = torch.searchsorted(self.edges, target.view(-1, self.rows))
        self.codes[column] = codes.view(-1)
        return self.tables.gather(1, codes).view(-1)

    def expand(self, parameters: Tensor) -> Tensor:
        return parameters.repeat_interleave(self.rows, 1).gather(0, self.codes)

    def reduce(self, matrix: Tensor) -> Tensor:
        sums = torch.zeros(len(self.parameters), matrix.shape[1]).scatter_add_(0, self.codes, matrix)
        return sums.view(len(self.parameters), -1, self.rows).sum(2)

    def squares(self, diagonal: Tensor) -> Tensor:
        return self.reduce(diagonal[:, None].expand(self.codes.shape))

    def set(self, parameters: Tensor) -> None:
        # Fitted entries may change places; the codes follow them.
        self.parameters, order = self._rounded(parameters).sort(0)
        self.codes = order.argsort(0).repeat_interleave(self.rows, 1).gather(0, self.codes)
        self._sort()

    def result(self) -> PalettizedTensor:
        return PalettizedTensor(self.scheme, self.codes.t().to(torch.uint8).contiguous(), self.tables.to(torch.float16))

    def _sort(self) -> None:
        self.tables = self.parameters.t().contiguous()
        self.edges = boundaries(self.tables)
