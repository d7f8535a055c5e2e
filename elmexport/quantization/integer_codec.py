"""Integer codes and fp16 scales: the codec of `Integer` schemes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.quantization import packed_bits
from elmexport.quantization.codec import FP16_MAX, Codec, Part, Quantized, Rounding, beyond_fp16, fp16_times
from elmexport.quantization.grids import Grid, finite_fp16
from elmexport.quantization.integers import least_squares, round_to_nearest
from elmexport.quantization.schemes import Integer
from elmexport.quantization.threads import in_threads

_CHUNK = 1 << 18  # values handled at a time: small enough for the temporaries to stay in a core's cache


@dataclass(frozen=True)
class IntegerTensor(Quantized):
    """A weight as integer codes and scales.

    `codes` int8 `[…, out, in]`; `scales` float16 `[…, out, groups]`, where a group is a block (`PerBlock`) or the whole row
    (`PerChannel`); `zeros` int8 `[…, out, groups]`, None for symmetric schemes. `value = (codes - zeros) * scales`, exact in float32 (a code
    has at most 8 bits, a scale 11).
    """

    scheme: Integer
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dequantize(self) -> Tensor:
        codes = self.codes.view(*self.scales.shape, -1).to(torch.float32)
        if self.zeros is not None:
            codes -= self.zeros[..., None]
        return (codes * self.scales.to(torch.float32)[..., None]).view(self.codes.shape)

    def scaled(self, factor: float) -> IntegerTensor | None:
        scales = fp16_times(self.scales, factor)
        return None if scales is None else replace(self, scales=scales)

    def parts(self) -> dict[str, Tensor]:
        width, lowest = self.scheme.width, self.scheme.range[0]
        codes = self.codes
        if packed_bits.packs(width, codes.shape[-1]):
            codes = packed_bits.pack((codes.to(torch.int16) - lowest).to(torch.uint8), width)
        return {"codes": codes, "scales": self.scales} | ({} if self.zeros is None else {"zeros": self.zeros})

    def grid(self) -> IntegerGrid:
        return IntegerGrid(self)

    @property
    def parameters(self) -> Tensor:
        return self.scales

    def with_parameters(self, parameters: Tensor) -> IntegerTensor:
        return replace(self, scales=finite_fp16(parameters, self.scales))


class IntegerCodec(Codec):
    """Quantization to integers.

    Stored as `codes`, `scales` and, where asymmetric, `zeros`; codes narrower than a byte are counted from the lowest code up and packed.
    """

    scheme: Integer

    def quantize(self, weight: Tensor, method: Rounding, importance: Tensor | None) -> IntegerTensor:
        """Quantize `weight` `[…, out, in]`; see `elmexport.quantization.integers` for the methods.

        Raises:
            ElmExportError: no such method.
        """
        scheme, shape = self.scheme, tuple(weight.shape)
        if method not in get_args(Rounding):
            raise ElmExportError(f"unknown method {method!r}; known: {', '.join(get_args(Rounding))}")
        block = scheme.block(shape[-1])
        groups = (*shape[:-1], shape[-1] // block)
        x = weight.reshape(-1, groups[-1], block)
        if importance is not None:
            importance = importance.view(-1, block)
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        scales = torch.empty(x.shape[:2], dtype=torch.float16, device=x.device)
        zeros = None if scheme.symmetric else torch.empty(x.shape[:2], dtype=torch.int8, device=x.device)
        step = max(1, _CHUNK // shape[-1])

        def work(start: int) -> None:
            part = slice(start, start + step)
            rows = x[part].to(torch.float32)
            found = round_to_nearest(rows, scheme) if method == "rtn" else least_squares(rows, scheme, importance, quick=method == "quick")
            codes[part], scales[part] = found[:2]
            if zeros is not None and found[2] is not None:
                zeros[part] = found[2]

        in_threads(work, range(0, len(x), step))
        return IntegerTensor(scheme, codes.view(shape), scales.view(groups), None if zeros is None else zeros.view(groups))

    def layout(self, shape: tuple[int, ...]) -> dict[str, Part]:
        scheme, columns = self.scheme, shape[-1]
        groups = (*shape[:-1], columns // scheme.block(columns))
        codes = Part(torch.int8, shape)
        if packed_bits.packs(scheme.width, columns):
            codes = Part(torch.uint8, (*shape[:-1], columns * scheme.width // 8))
        parts = {"codes": codes, "scales": Part(torch.float16, groups)}
        return parts if scheme.symmetric else parts | {"zeros": Part(torch.int8, groups)}

    def from_parts(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> IntegerTensor:
        codes, width = parts["codes"], self.scheme.width
        if packed_bits.packs(width, shape[-1]):
            codes = packed_bits.unpack(codes, width).to(torch.int8) + self.scheme.range[0]
        return IntegerTensor(self.scheme, codes, parts["scales"], None if self.scheme.symmetric else parts["zeros"])

    def beyond(self, low: float, high: float) -> str | None:
        if self.scheme.symmetric:
            return beyond_fp16(max(-low, high), FP16_MAX * max(map(abs, self.scheme.range)), "a scale")
        return beyond_fp16(max(high, 0) - min(low, 0), FP16_MAX * self.scheme.range[1], "a scale")


class IntegerGrid(Grid):
    """Integer codes; parameters are scales, `[groups, out]`."""

    def __init__(self, start: IntegerTensor) -> None:
        self.scheme = start.scheme
        self.low, self.high = self.scheme.range
        self.parameters = start.scales.t().to(torch.float32).contiguous()
        self.block = start.codes.shape[1] // len(self.parameters)
        self.zeros = self.parameters.new_zeros(1) if start.zeros is None else start.zeros.t().to(torch.float32).contiguous()
        self.offsets = start.codes.t().to(torch.float32)  # codes less zero points
        if start.zeros is not None:
            self.offsets -= self.zeros.repeat_interleave(self.block, 0)
        self.offsets = self.offsets.contiguous()
        self._invert()

    def round(self, column: int, target: Tensor) -> Tensor:
        group = column // self.block
        codes = torch.mul(target, self.inverse[group], out=self.offsets[column])
        if self.scheme.symmetric:
            codes.round_().clamp_(self.low, self.high)
        else:
            codes.round_().add_(self.zeros[group]).clamp_(self.low, self.high).sub_(self.zeros[group])
        return codes * self.parameters[group]

    def expand(self, parameters: Tensor) -> Tensor:
        return (self._blocks(self.offsets) * parameters[:, None]).view(self.offsets.shape)

    def reduce(self, matrix: Tensor) -> Tensor:
        return (self._blocks(matrix) * self._blocks(self.offsets)).sum(1)

    def squares(self, diagonal: Tensor) -> Tensor:
        return (self._blocks(self.offsets).square() * diagonal.view(-1, self.block, 1)).sum(1)

    def set(self, parameters: Tensor) -> None:
        self.parameters = self.fp16(parameters)
        self._invert()

    def result(self) -> IntegerTensor:
        if self.scheme.symmetric:
            return IntegerTensor(self.scheme, self.offsets.t().to(torch.int8).contiguous(), self._scales())
        codes = self.offsets + self.zeros.repeat_interleave(self.block, 0)
        zeros = self.zeros.t().to(torch.int8).contiguous()
        return IntegerTensor(self.scheme, codes.t().to(torch.int8).contiguous(), self._scales(), zeros)

    def _scales(self) -> Tensor:
        return self.parameters.t().to(torch.float16).contiguous()

    def _blocks(self, matrix: Tensor) -> Tensor:
        return matrix.view(len(self.parameters), self.block, -1)

    def _invert(self) -> None:
        self.inverse = torch.where(self.parameters == 0, 0.0, self.parameters.reciprocal())
