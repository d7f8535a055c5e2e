"""Indices into tables of fp16 values: the codec of `Lut` schemes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.quantization import packed_bits
from elmexport.quantization.codec import FP16_MAX, Codec, Part, Quantized, Rounding, beyond_fp16, fp16_times
from elmexport.quantization.grids import Grid, finite_fp16
from elmexport.quantization.kmeans import boundaries, cluster
from elmexport.quantization.schemes import Lut


@dataclass(frozen=True)
class PalettizedTensor(Quantized):
    """A weight as indices into tables.

    `codes` uint8 `[…, out, in]`; `tables` float16 `[groups, entries]`, ascending; a group is as many consecutive rows as the rows divide
    into. `value = tables[group of the row, code]`.
    """

    scheme: Lut
    codes: Tensor
    tables: Tensor

    def dequantize(self) -> Tensor:
        groups = len(self.tables)
        values = self.tables.to(torch.float32).gather(1, self.codes.view(groups, -1).to(torch.int64))
        return values.view(self.codes.shape)

    def scaled(self, factor: float) -> PalettizedTensor | None:
        tables = fp16_times(self.tables, factor)
        return None if tables is None else replace(self, tables=tables)

    def parts(self) -> dict[str, Tensor]:
        packs = _packs(self.scheme, self.codes.shape[-1])
        return {"codes": packed_bits.pack(self.codes, self.scheme.width) if packs else self.codes, "tables": self.tables}

    def grid(self) -> TableGrid:
        return TableGrid(self)

    @property
    def parameters(self) -> Tensor:
        return self.tables

    def with_parameters(self, parameters: Tensor) -> PalettizedTensor:
        # An entry that would pass its neighbour stops there: tables are ascending.
        return replace(self, tables=finite_fp16(parameters, self.tables).cummax(-1).values)


class LutCodec(Codec):
    """Quantization to look-up tables, by k-means. Stored as `codes` and `tables`; 4-bit codes are packed."""

    scheme: Lut

    def quantize(self, weight: Tensor, method: Rounding, importance: Tensor | None) -> PalettizedTensor:
        """Quantize `weight` `[…, out, in]`; see `elmexport.quantization.kmeans.cluster`.

        Raises:
            ElmExportError: method "rtn".
        """
        if method == "rtn":
            raise ElmExportError(f"method {method!r} does not exist for {self.scheme}; tables come from k-means: choose 'mse'")
        groups = self.scheme.granularity.count(tuple(weight.shape))
        # On the CPU: the search is in float64, which not every device has.
        codes, tables = cluster(weight.cpu().reshape(groups, -1), self.scheme.entries, None if importance is None else importance.cpu())
        return PalettizedTensor(self.scheme, codes.view(weight.shape).to(weight.device), tables.to(weight.device))

    def layout(self, shape: tuple[int, ...]) -> dict[str, Part]:
        columns = shape[-1] * self.scheme.width // 8 if _packs(self.scheme, shape[-1]) else shape[-1]
        tables = (self.scheme.granularity.count(shape), self.scheme.entries)
        return {"codes": Part(torch.uint8, (*shape[:-1], columns)), "tables": Part(torch.float16, tables)}

    def from_parts(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> PalettizedTensor:
        packs = _packs(self.scheme, shape[-1])
        codes = packed_bits.unpack(parts["codes"], self.scheme.width) if packs else parts["codes"]
        if not packs and int(codes.max()) >= self.scheme.entries:
            raise ElmExportError(f"the codes are damaged: one is {int(codes.max())}, the tables have {self.scheme.entries} entries")
        return PalettizedTensor(self.scheme, codes, parts["tables"])

    def beyond(self, low: float, high: float) -> str | None:
        return beyond_fp16(max(-low, high), FP16_MAX, "a table entry")


class TableGrid(Grid):
    """Table indices; parameters are table entries, `[entries, groups]`."""

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
        sums = matrix.new_zeros(len(self.parameters), matrix.shape[1]).scatter_add_(0, self.codes, matrix)
        return sums.view(len(self.parameters), -1, self.rows).sum(2)

    def squares(self, diagonal: Tensor) -> Tensor:
        return self.reduce(diagonal[:, None].expand(self.codes.shape))

    def set(self, parameters: Tensor) -> None:
        # Fitted entries may change places; the codes follow them.
        self.parameters, order = self.fp16(parameters).sort(0)
        self.codes = order.argsort(0).repeat_interleave(self.rows, 1).gather(0, self.codes)
        self._sort()

    def result(self) -> PalettizedTensor:
        return PalettizedTensor(self.scheme, self.codes.t().to(torch.uint8).contiguous(), self.tables.to(torch.float16))

    def _sort(self) -> None:
        self.tables = self.parameters.t().contiguous()
        self.edges = boundaries(self.tables)


def _packs(scheme: Lut, columns: int) -> bool:
    """6-bit codes lie one in a byte, as files of format 1 have always had them."""
    return scheme.width == 4 and packed_bits.packs(scheme.width, columns)
