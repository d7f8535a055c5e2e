"""E2M1 elements and shared exponents: the codec of `Mxfp4`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.quantization import packed_bits
from elmexport.quantization.codec import Codec, Part, Quantized, Rounding
from elmexport.quantization.grids import Grid
from elmexport.quantization.mxfp4 import BLOCK, Mxfp4
from elmexport.quantization.threads import in_threads

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; those of a negative sign are 8 more
LARGEST_EXPONENT = 127  # E8M0: from -127 to 127
_MIDDLES = tuple((low + high) / 2 for low, high in pairwise(MAGNITUDES))
# Exponents to try beside the least one that clips nothing. One less clips the largest values and halves every other error.
_OFFSETS = (-1, 1)
_CHUNK = 1 << 18  # values handled at a time: small enough for the temporaries to stay in a core's cache


@dataclass(frozen=True)
class Mxfp4Tensor(Quantized):
    """A weight as MXFP4: `codes` uint8 `[…, out, in]` from 0 to 15, the sign in the highest bit; `exponents` int8 `[…, out, blocks]`."""

    scheme: Mxfp4
    codes: Tensor
    exponents: Tensor

    def dequantize(self) -> Tensor:
        return (elements(self.codes).view(*self.exponents.shape, BLOCK) * _powers(self.exponents)[..., None]).view(self.codes.shape)

    def scaled(self, factor: float) -> Mxfp4Tensor | None:
        exponents = self.exponents.to(torch.int16) + (math.frexp(factor)[1] - 1)
        if int(exponents.abs().max()) > LARGEST_EXPONENT:
            return None
        return replace(self, exponents=exponents.to(torch.int8))

    def exponent_bytes(self) -> Tensor:
        """Exponents as E8M0 bytes: 127 more."""
        return (self.exponents.to(torch.int16) + LARGEST_EXPONENT).to(torch.uint8)

    def parts(self) -> dict[str, Tensor]:
        return {"codes": packed_bits.pack(self.codes, self.scheme.width), "exponents": self.exponent_bytes()}

    def grid(self) -> Mxfp4Grid:
        return Mxfp4Grid(self)


class Mxfp4Codec(Codec):
    """Quantization to MXFP4; stored as packed `codes` and `exponents` (E8M0)."""

    scheme: Mxfp4

    def quantize(self, weight: Tensor, method: Rounding, importance: Tensor | None) -> Mxfp4Tensor:
        """Quantize `weight` `[…, out, in]`.

        `rtn` takes the least exponent at which no value of a block is clipped, as MLX does; `mse` (and `quick`) that of least squared error
        among it and its neighbours. Elements are the nearest, ties to even codes.

        Raises:
            ElmExportError: no such method.
        """
        if method not in get_args(Rounding):
            raise ElmExportError(f"unknown method {method!r}; known: {', '.join(get_args(Rounding))}")
        shape = tuple(weight.shape)
        blocks = (*shape[:-1], shape[-1] // BLOCK)
        x = weight.reshape(-1, blocks[-1], BLOCK)
        if importance is not None:
            importance = importance.view(-1, BLOCK)
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        exponents = torch.empty(x.shape[:2], dtype=torch.int8, device=x.device)
        step = max(1, _CHUNK // shape[-1])

        def work(start: int) -> None:
            part = slice(start, start + step)
            rows = x[part].to(torch.float32)
            found = _least_exponents(rows)
            if method != "rtn":
                found = _best_exponents(rows, found, importance)
            exponents[part] = found
            codes[part] = nearest(rows / _powers(found)[..., None])

        in_threads(work, range(0, len(x), step))
        return Mxfp4Tensor(self.scheme, codes.view(shape), exponents.view(blocks))

    def layout(self, shape: tuple[int, ...]) -> dict[str, Part]:
        *rows, columns = shape
        return {
            "codes": Part(torch.uint8, (*rows, columns * self.scheme.width // 8)),
            "exponents": Part(torch.uint8, (*rows, columns // BLOCK)),
        }

    def from_parts(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Mxfp4Tensor:
        exponents = (parts["exponents"].to(torch.int16) - LARGEST_EXPONENT).to(torch.int8)
        return Mxfp4Tensor(self.scheme, packed_bits.unpack(parts["codes"], self.scheme.width), exponents)

    def beyond(self, low: float, high: float) -> str | None:
        """Infinite values alone; exponents reach beyond those of float32."""
        return None if math.isfinite(low) and math.isfinite(high) else "weights are infinite"


class Mxfp4Grid(Grid):
    """MXFP4 codes; parameters are the blocks' powers of two, `[blocks, out]`."""

    def __init__(self, start: Mxfp4Tensor) -> None:
        self.scheme = start.scheme
        self.parameters = _powers(start.exponents).t().contiguous()
        self.offsets = elements(start.codes).t().contiguous()

    def round(self, column: int, target: Tensor) -> Tensor:
        scale = self.parameters[column // BLOCK]
        self.offsets[column] = elements(nearest(target / scale))
        return self.offsets[column] * scale

    def expand(self, parameters: Tensor) -> Tensor:
        return (self._blocks(self.offsets) * parameters[:, None]).view(self.offsets.shape)

    def reduce(self, matrix: Tensor) -> Tensor:
        return (self._blocks(matrix) * self._blocks(self.offsets)).sum(1)

    def squares(self, diagonal: Tensor) -> Tensor:
        return (self._blocks(self.offsets).square() * diagonal.view(-1, BLOCK, 1)).sum(1)

    def set(self, parameters: Tensor) -> None:
        exponents = parameters.clamp(min=torch.finfo(torch.float32).tiny).log2().round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
        self.parameters = torch.where(parameters > 0, _powers(exponents), self.parameters)

    def result(self) -> Mxfp4Tensor:
        exponents = self.parameters.log2().round().to(torch.int8).t().contiguous()
        return Mxfp4Tensor(self.scheme, nearest(self.offsets.t()), exponents)

    def _blocks(self, matrix: Tensor) -> Tensor:
        return matrix.view(len(self.parameters), BLOCK, -1)


def elements(codes: Tensor) -> Tensor:
    """Look up the E2M1 numbers, float32, of `codes` uint8."""
    table = torch.tensor((*MAGNITUDES, *(-value for value in MAGNITUDES)), device=codes.device)
    return table[codes.to(torch.int32)]


def nearest(x: Tensor) -> Tensor:
    """Find the codes uint8 of the E2M1 numbers nearest to `x` float32; ties go to even codes, too large values to the largest code."""
    middles = torch.tensor(_MIDDLES, device=x.device)
    size = x.abs().contiguous()
    magnitude = torch.bucketize(size, middles[0::2].contiguous()) + torch.bucketize(size, middles[1::2].contiguous(), right=True)
    return (magnitude + 8 * ((x < 0) & (magnitude > 0))).to(torch.uint8)


def _least_exponents(x: Tensor) -> Tensor:
    """Least exponents int8 at which the largest value of each block `[…, block]` is at most 6; 0 for blocks of zeros."""
    mantissa, exponent = torch.frexp(x.abs().amax(-1))
    found = exponent - torch.where(mantissa > 0.75, 2, 3)  # 6 is 0.75 * 2^3
    return torch.where(mantissa == 0, 0, found).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int8)


def _best_exponents(x: Tensor, start: Tensor, importance: Tensor | None) -> Tensor:
    best, best_error = start, _error(x, start, importance)
    for offset in _OFFSETS:
        exponents = (start.to(torch.int16) + offset).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int8)
        error = _error(x, exponents, importance)
        better = error < best_error
        best, best_error = torch.where(better, exponents, best), torch.where(better, error, best_error)
    return best


def _error(x: Tensor, exponents: Tensor, importance: Tensor | None) -> Tensor:
    """(Weighted) squared error of each block."""
    scale = _powers(exponents)[..., None]
    squares = (elements(nearest(x / scale)) * scale - x).square_()
    return (squares if importance is None else squares * importance).sum(-1)


def _powers(exponents: Tensor) -> Tensor:
    """`2 ** exponents`, float32, exactly: written as bits, the least of them as a subnormal number."""
    field = exponents.to(torch.int32) + LARGEST_EXPONENT
    return torch.where(field > 0, field << 23, 1 << 22).to(torch.int32).view(torch.float32)
