"""Quantized tensors, and the way to them from numbers: `quantize`. No policy, no packing, no I/O.

Methods that need more of the calibration than a weight for each input channel are in `calibration.gptq`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args, overload

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.quantization.integers import least_squares, round_to_nearest
from elmexport.quantization.lut import cluster
from elmexport.quantization.schemes import Integer, Lut
from elmexport.quantization.threads import in_threads

Method = Literal["mse", "rtn"]

FP16_MAX = 65504.0
_CHUNK = 1 << 18  # values handled at a time: small enough for the temporaries to stay in a core's cache
# Importance that every input channel has beyond what was measured, as a part of the mean: a channel silent on the calibration text may
# speak up on another.
_IMPORTANCE_FLOOR = 0.01


class Moments(Protocol):
    """What `quantize` needs of a calibration (`calibration.statistics.Moments`)."""

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each input channel, float32 `[in]`."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix as integer codes and scales.

    `codes` int8 `[out, in]`; `scales` float16 `[out, granules]`, where a granule is a block (`PerBlock`) or the whole row
    (`PerChannel`); `zeros` int8 `[out, granules]`, None for symmetric schemes. `value = (codes - zeros) * scales`, exact in float32 (a code
    has at most 8 bits, a scale 11).
    """

    scheme: Integer
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 `[out, in]`."""
        rows, granules = self.scales.shape
        codes = self.codes.view(rows, granules, -1).to(torch.float32)
        if self.zeros is not None:
            codes -= self.zeros[:, :, None]
        return (codes * self.scales.to(torch.float32)[:, :, None]).view(self.codes.shape)

    def scaled(self, factor: float) -> QuantizedTensor:
        """The tensor times a power of two, exactly.

        Raises:
            ElmExportError: an fp16 scale would overflow, or lose bits to underflow.
        """
        return replace(self, scales=_times(self.scales, factor, "scales"))


@dataclass(frozen=True)
class PalettizedTensor:
    """A matrix as indices into tables.

    `codes` uint8 `[out, in]`; `tables` float16 `[groups, entries]`, ascending; a group is `out / groups` consecutive rows.
    `value = tables[group of the row, code]`.
    """

    scheme: Lut
    codes: Tensor
    tables: Tensor

    def dequantize(self) -> Tensor:
        """float32 `[out, in]`."""
        groups = len(self.tables)
        values = self.tables.to(torch.float32).gather(1, self.codes.view(groups, -1).to(torch.int64))
        return values.view(self.codes.shape)

    def scaled(self, factor: float) -> PalettizedTensor:
        """The tensor times a power of two, exactly.

        Raises:
            ElmExportError: an fp16 entry would overflow, or lose bits to underflow.
        """
        return replace(self, tables=_times(self.tables, factor, "table entries"))


@overload
def quantize(weight: Tensor, scheme: Integer, method: Method = "mse", moments: Moments | None = None) -> QuantizedTensor: ...
@overload
def quantize(weight: Tensor, scheme: Lut, method: Method = "mse", moments: Moments | None = None) -> PalettizedTensor: ...
def quantize(
    weight: Tensor, scheme: Integer | Lut, method: Method = "mse", moments: Moments | None = None
) -> QuantizedTensor | PalettizedTensor:
    """Quantize `weight` `[out, in]` (any float dtype) to `scheme`.

    `rtn` takes the scale from a granule's extreme values and rounds to nearest, as ggml's Q4_0 and Q8_0 do. `mse` searches the scale of
    least squared error; with `moments`, squares are weighted by the mean square of their input channel, which makes it the error of the
    output as far as channels are uncorrelated. Tables come from k-means, weighted likewise, and have no `rtn`.

    Raises:
        ElmExportError: the shape does not fit the scheme, a scale or entry does not fit fp16, moments that are not finite or of another
            length, or `rtn` for a table.
    """
    check_fits(weight, scheme)
    importance = None if moments is None else _importance(moments.mean_square, weight.shape[1])
    if isinstance(scheme, Lut):
        if method != "mse":
            raise ElmExportError(f"method {method!r} does not exist for {scheme}; tables come from k-means: choose 'mse'")
        groups = scheme.granularity.count(tuple(weight.shape))
        codes, tables = cluster(weight.reshape(groups, -1), scheme.entries, importance)
        return PalettizedTensor(scheme, codes.view(weight.shape), tables)
    if method not in get_args(Method):
        raise ElmExportError(f"unknown method {method!r}; known: {', '.join(get_args(Method))}")
    rows, columns = weight.shape
    block = scheme.block(columns)
    grouped = weight.reshape(rows, -1, block)
    if importance is not None:
        importance = importance.view(-1, block)
    codes = torch.empty(grouped.shape, dtype=torch.int8)
    scales = torch.empty(grouped.shape[:2], dtype=torch.float16)
    zeros = None if scheme.symmetric else torch.empty(grouped.shape[:2], dtype=torch.int8)
    step = max(1, _CHUNK // columns)

    def work(start: int) -> None:
        part = slice(start, start + step)
        x = grouped[part].to(torch.float32)
        found = round_to_nearest(x, scheme) if method == "rtn" else least_squares(x, scheme, importance)
        codes[part], scales[part] = found[:2]
        if zeros is not None and found[2] is not None:
            zeros[part] = found[2]

    in_threads(work, range(0, rows, step))
    return QuantizedTensor(scheme, codes.view(rows, columns), scales, zeros)


def check_fits(weight: Tensor, scheme: Integer | Lut) -> None:
    """Refuse a weight that `scheme` cannot hold.

    Raises:
        ElmExportError: the shape does not fit the scheme, or a scale or table entry would not fit fp16.
    """
    reason = scheme.refuses(tuple(weight.shape))
    if reason is not None:
        raise ElmExportError(f"a tensor of shape {list(weight.shape)} cannot be quantized to {scheme}: {reason}")
    # Checked before a search: it would take an overflowing scale for a bad candidate, and end at zero.
    low, high = (float(end) for end in weight.aminmax())
    if isinstance(scheme, Lut):
        largest, reach, what = max(-low, high), FP16_MAX, "a table entry"
    elif scheme.symmetric:
        largest, reach, what = max(-low, high), FP16_MAX * max(map(abs, scheme.range)), "a scale"
    else:
        largest, reach, what = max(high, 0) - min(low, 0), FP16_MAX * 15, "a scale"
    if not largest <= reach:
        raise ElmExportError(
            f"the largest weight, {largest:.3g}, needs {what} that exceeds fp16's 65504 (codes reach {reach:.3g}); export this checkpoint in a float format"
        )


def _importance(mean_square: Tensor, columns: int) -> Tensor:
    """Weights of the input channels, float32 `[in]`, their mean 1 (all 1 where nothing was measured)."""
    if mean_square.shape != (columns,):
        raise ElmExportError(f"moments of {list(mean_square.shape)} input channels do not belong to a weight with {columns}")
    if not (torch.isfinite(mean_square).all() and (mean_square >= 0).all()):
        raise ElmExportError("the calibration's mean squares hold NaN, infinite or negative values; calibrate again")
    mean = mean_square.mean()
    if mean == 0:
        return torch.ones(columns)
    importance = mean_square.to(torch.float32) / mean + _IMPORTANCE_FLOOR
    return importance / importance.mean()


def _times(values: Tensor, factor: float, what: str) -> Tensor:
    product = values.to(torch.float32) * factor
    rounded = product.to(torch.float16)
    if not torch.equal(rounded.to(torch.float32), product):
        raise ElmExportError(
            f"{what} down to {float(values.abs()[values != 0].min()):.3g} cannot be multiplied by {factor:g} exactly in fp16; "
            "the residual rescaling leaves no room for these weights in fp16 scales"
        )
    return rounded
