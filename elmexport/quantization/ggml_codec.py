"""Codes, whole-number scales and fp16 factors: the codec of `GgmlCoded` schemes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.quantization import packed_bits
from elmexport.quantization.codec import FP16_MAX, Codec, Part, Quantized, Rounding, beyond_fp16, fp16_times
from elmexport.quantization.ggml_coded import GgmlCoded
from elmexport.quantization.ggml_search import iq4_edges, levels, search
from elmexport.quantization.grids import Grid, finite_fp16
from elmexport.quantization.threads import in_threads

_CHUNK = 1 << 17  # values searched at a time: small enough for the temporaries to stay in a core's cache


@dataclass(frozen=True)
class BlockTensor(Quantized):
    """A weight as ggml's blocks hold it; `GgmlCoded` says what a value is.

    `codes` int8 `[…, out, in]`; `scales` and `minima` int8 `[…, out, sub-blocks]`; `d` and `dmin` float16 `[…, out, blocks]` (zero where the
    type has no minimum).
    """

    scheme: GgmlCoded
    codes: Tensor
    scales: Tensor
    minima: Tensor
    d: Tensor
    dmin: Tensor

    def dequantize(self) -> Tensor:
        subs = self.scales.shape[-1] // self.d.shape[-1]
        scale = self.d.to(torch.float32).repeat_interleave(subs, -1) * self.scales
        minimum = self.dmin.to(torch.float32).repeat_interleave(subs, -1) * self.minima
        level = levels(self.codes, self.scheme).view(*scale.shape, -1)
        return (level * scale[..., None] - minimum[..., None]).view(self.codes.shape)

    def scaled(self, factor: float) -> BlockTensor | None:
        d, dmin = fp16_times(self.d, factor), fp16_times(self.dmin, factor)
        return None if d is None or dmin is None else replace(self, d=d, dmin=dmin)

    def parts(self) -> dict[str, Tensor]:
        scheme = self.scheme
        unsigned = (self.codes - (scheme.low or 0)).to(torch.uint8)
        parts = {"codes": packed_bits.pack(unsigned, scheme.width), "d": self.d}
        if scheme.scales is not None:
            parts["scales"] = self.scales
        if scheme.has_minimum:
            parts["dmin"] = self.dmin
        if scheme.minima is not None:
            parts["minima"] = self.minima
        return parts

    def grid(self) -> BlockGrid:
        return BlockGrid(self)

    @property
    def parameters(self) -> Tensor:
        return torch.cat((self.d, self.dmin), -1) if self.scheme.has_minimum else self.d

    def with_parameters(self, parameters: Tensor) -> BlockTensor:
        found = finite_fp16(parameters, self.parameters)
        if not self.scheme.has_minimum:
            return replace(self, d=found)
        d, dmin = found.chunk(2, -1)
        return replace(self, d=d.contiguous(), dmin=dmin.contiguous())


class GgmlCodec(Codec):
    """Quantization to one of ggml's block types. Stored as `codes` (packed) and `d`, and `scales`, `dmin` and `minima` where there are any."""

    scheme: GgmlCoded

    def quantize(self, weight: Tensor, method: Rounding, importance: Tensor | None) -> BlockTensor:
        """Quantize `weight` `[…, out, in]`; see `elmexport.quantization.ggml_search`.

        Raises:
            ElmExportError: method "rtn".
        """
        if method == "rtn":
            raise ElmExportError(f"method {method!r} does not exist for {self.scheme}, whose scales are searched; choose 'mse'")
        scheme, shape = self.scheme, tuple(weight.shape)
        columns = shape[-1]
        blocks, subs = columns // scheme.block, scheme.block // scheme.sub
        x = weight.reshape(-1, blocks, subs, scheme.sub)
        weights = None if importance is None else importance.view(1, blocks, subs, scheme.sub)
        device = x.device
        codes = torch.empty(x.shape, dtype=torch.int8, device=device)
        scales, minima = (torch.empty(x.shape[:3], dtype=torch.int8, device=device) for _ in range(2))
        d, dmin = (torch.empty(x.shape[:2], dtype=torch.float16, device=device) for _ in range(2))
        step = max(1, _CHUNK // columns)

        def work(start: int) -> None:
            part = slice(start, start + step)
            rows = x[part].to(torch.float32)
            spread = None if weights is None else weights.expand(rows.shape).flatten(0, 1)
            found = search(rows.flatten(0, 1), scheme, spread, quick=method == "quick")
            for target, value in zip(
                (codes, scales, minima, d, dmin), (found.codes, found.scales, found.minima, found.d, found.dmin), strict=True
            ):
                target[part] = value.view(target[part].shape)

        in_threads(work, range(0, len(x), step))
        rest = shape[:-1]
        return BlockTensor(
            scheme,
            codes.view(shape),
            scales.view(*rest, blocks * subs),
            minima.view(*rest, blocks * subs),
            d.view(*rest, blocks),
            dmin.view(*rest, blocks),
        )

    def layout(self, shape: tuple[int, ...]) -> dict[str, Part]:
        scheme, rest, columns = self.scheme, shape[:-1], shape[-1]
        parts = {
            "codes": Part(torch.uint8, (*rest, columns * scheme.width // 8)),
            "d": Part(torch.float16, (*rest, columns // scheme.block)),
        }
        if scheme.scales is not None:
            parts["scales"] = Part(torch.int8, (*rest, columns // scheme.sub))
        if scheme.has_minimum:
            parts["dmin"] = parts["d"]
        if scheme.minima is not None:
            parts["minima"] = parts["scales"]
        return parts

    def from_parts(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> BlockTensor:
        scheme = self.scheme
        codes = (packed_bits.unpack(parts["codes"], scheme.width).to(torch.int8) + (scheme.low or 0)).view(shape)
        ones = torch.ones((*shape[:-1], shape[-1] // scheme.sub), dtype=torch.int8)
        dmin = parts["dmin"] if scheme.has_minimum else torch.zeros_like(parts["d"])
        return BlockTensor(scheme, codes, parts.get("scales", ones), parts.get("minima", ones), parts["d"], dmin)

    def beyond(self, low: float, high: float) -> str | None:
        # An fp16 factor times the smallest reach of a type's whole numbers and codes holds far more than any weight; fp16's own range is plenty.
        return beyond_fp16(max(-low, high), FP16_MAX, "values")


class BlockGrid(Grid):
    """Codes of ggml's blocks; parameters are `d`, then `dmin` where there is one, of every block: `[blocks or 2 * blocks, out]`.

    The whole numbers stay as the search left them.
    """

    def __init__(self, start: BlockTensor) -> None:
        self.start, self.scheme = start, start.scheme
        self.parameters = start.parameters.t().to(torch.float32).contiguous()
        self.scales, self.minima = (whole.t().to(torch.float32).contiguous() for whole in (start.scales, start.minima))
        self.blocks = start.d.shape[-1]
        self.codes = start.codes.t().contiguous()
        self.level = levels(self.codes, self.scheme)
        self._edges = iq4_edges(self.codes.device)
        self._spread()

    def round(self, column: int, target: Tensor) -> Tensor:
        sub = column // self.scheme.sub
        ratio = (target + self.minimum[sub]) * self.inverse[sub]
        if self.scheme.low is None:
            codes = torch.bucketize(ratio, self._edges)
            self.codes[column], self.level[column] = codes, levels(codes, self.scheme)
        else:
            self.level[column] = ratio.round_().clamp_(self.scheme.low, self.scheme.high)
            self.codes[column] = self.level[column]
        return self.level[column] * self.scale[sub] - self.minimum[sub]

    def expand(self, parameters: Tensor) -> Tensor:
        values = self._subs(self.level) * self._per_sub(parameters[: self.blocks], self.scales)[:, None]
        if self.scheme.has_minimum:
            values -= self._per_sub(parameters[self.blocks :], self.minima)[:, None]
        return values.view(self.level.shape)

    def reduce(self, matrix: Tensor) -> Tensor:
        subs = self._subs(matrix)
        found = self._per_block(self.scales * (subs * self._subs(self.level)).sum(1))
        return torch.cat((found, -self._per_block(self.minima * subs.sum(1)))) if self.scheme.has_minimum else found

    def squares(self, diagonal: Tensor) -> Tensor:
        weights = diagonal.view(-1, self.scheme.sub, 1)
        found = self._per_block(self.scales.square() * (self._subs(self.level).square() * weights).sum(1))
        if not self.scheme.has_minimum:
            return found
        return torch.cat((found, self._per_block(self.minima.square() * weights.sum(1))))

    def set(self, parameters: Tensor) -> None:
        self.parameters = self.fp16(parameters)
        self._spread()

    def result(self) -> BlockTensor:
        return replace(self.start, codes=self.codes.t().contiguous()).with_parameters(self.parameters.t())

    def _subs(self, matrix: Tensor) -> Tensor:
        return matrix.view(len(self.scales), self.scheme.sub, -1)

    def _per_sub(self, per_block: Tensor, whole: Tensor) -> Tensor:
        return per_block.repeat_interleave(len(whole) // self.blocks, 0) * whole

    def _per_block(self, per_sub: Tensor) -> Tensor:
        return per_sub.view(self.blocks, -1, per_sub.shape[-1]).sum(1)

    def _spread(self) -> None:
        """Scale and minimum of every sub-block, `[sub-blocks, out]`."""
        self.scale = self._per_sub(self.parameters[: self.blocks], self.scales)
        self.minimum = (
            self._per_sub(self.parameters[self.blocks :], self.minima) if self.scheme.has_minimum else torch.zeros_like(self.scale)
        )
        self.inverse = torch.where(self.scale == 0, 0.0, self.scale.reciprocal())
