"""Search of scales, minima and codes of ggml's block types, of least squared error.

Everything here works on float32 `x` `[blocks, subs, values]`: blocks, their sub-blocks, and the values of these. Each sub-block's own best
scale (and minimum) is found first, by least squares over several roundings; then a block's fp16 `d` (and `dmin`) turn them into whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elmexport.quantization.ggml_coded import IQ4_LEVELS, GgmlCoded

# Distances (in codes) between the code that the largest magnitude of a sub-block gets and the last one, tried in turn.
_OVERSHOOT = (0.0, -0.9, -0.45, 0.45, 0.9)
_SPANS = (0.0, -0.9, -0.6, -0.3, 0.3, 0.6, 0.9)
_QUICK_OVERSHOOT, _QUICK_SPANS = (0.0, -0.9), (0.0, -0.6, 0.6)
_TURNS = 2  # of codes and whole numbers; a quick search takes one


@dataclass(frozen=True)
class Found:
    """`codes` int8 as `x`, `scales` and `minima` int8 `[blocks, subs]`, `d` and `dmin` float16 `[blocks]`."""

    codes: Tensor
    scales: Tensor
    minima: Tensor
    d: Tensor
    dmin: Tensor


def search(x: Tensor, kind: GgmlCoded, importance: Tensor | None, *, quick: bool = False) -> Found:
    """Search parameters and codes of `x`, among fewer if `quick`; `importance`, of the same shape, weights the squares."""
    weight = torch.ones_like(x[..., :1]) if importance is None else importance
    if kind.has_minimum:
        scale, minimum = _affine(x, kind, weight, _QUICK_SPANS if quick else _SPANS)
    else:
        scale, minimum = _symmetric(x, kind, weight, _QUICK_OVERSHOOT if quick else _OVERSHOOT), torch.zeros_like(x[..., 0])
    d, scales = _whole(scale, kind.scales)
    dmin, minima = _whole(minimum, kind.minima)
    codes = nearest(x, kind, _product(d, scales), _product(dmin, minima))
    if kind.scales is not None:
        codes, scales, minima = _settled(x, kind, weight, codes, scales, minima, d, dmin, 1 if quick else _TURNS)
    # Given codes and whole numbers, a block's d and dmin have a least-squares solution of their own.
    refined_d, refined_dmin = _refined(x, weight, levels(codes, kind), scales, minima, d, dmin, kind)
    refined = nearest(x, kind, _product(refined_d, scales), _product(refined_dmin, minima))
    before = _error(x, weight, levels(codes, kind), _product(d, scales), _product(dmin, minima)).sum(-1)
    after = _error(x, weight, levels(refined, kind), _product(refined_d, scales), _product(refined_dmin, minima)).sum(-1)
    better = after < before
    return Found(
        torch.where(better[:, None, None], refined, codes),
        scales.to(torch.int8),
        minima.to(torch.int8),
        torch.where(better, refined_d, d),
        torch.where(better, refined_dmin, dmin),
    )


def nearest(x: Tensor, kind: GgmlCoded, scale: Tensor, minimum: Tensor) -> Tensor:
    """The codes int8 nearest to `x`, for `scale` and `minimum` of its sub-blocks; zero where a scale is zero."""
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    ratio = (x + minimum[..., None]) * inverse[..., None]
    if kind.low is None:
        # The edges are multiples of a half: twice a ratio, rounded up, says between which it lies.
        return _iq4_codes(x.device)[ratio.mul_(2).ceil_().nan_to_num_(0.0).clamp_(-256, 255).add_(256).to(torch.int32)]
    return ratio.round_().clamp_(kind.low, kind.high).to(torch.int8)


def levels(codes: Tensor, kind: GgmlCoded) -> Tensor:
    """Levels, float32, that codes stand for before they are scaled."""
    if kind.low is None:
        return torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=codes.device)[codes.to(torch.int64)]
    return codes.to(torch.float32)


def _iq4_codes(device: torch.device) -> Tensor:
    """The code int8 nearest to every multiple of a half from -128 to 127.5, the lower of two."""
    return torch.bucketize(torch.arange(-128, 128, 0.5, device=device), iq4_edges(device)).to(torch.int8)


def iq4_edges(device: torch.device) -> Tensor:
    """Bounds between the levels of IQ4."""
    table = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=device)
    return (table[1:] + table[:-1]) / 2


def _affine(x: Tensor, kind: GgmlCoded, weight: Tensor, spans: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Best scale and minimum (not below zero, except where it is no whole number) of each sub-block by itself."""
    low, high = x.amin(-1), x.amax(-1)
    if kind.minima is not None:
        low = low.clamp(max=0)
    top = (1 << kind.width) - 1
    total, first = weight.expand(x.shape).sum(-1), (weight * x).sum(-1)
    best_scale, best_minimum = torch.zeros_like(low), torch.zeros_like(low)
    best = torch.full_like(low, torch.inf)
    span = high - low
    for delta in spans:
        inverse = torch.where(span > 0, (top + delta) / span, 0.0)
        codes = ((x - low[..., None]) * inverse[..., None]).round_().clamp_(0, top)
        weighted = weight * codes
        once, twice, cross = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * x).sum(-1)
        determinant = total * twice - once * once
        scale = torch.where(determinant > 0, (total * cross - first * once) / determinant, 0.0)
        minimum = torch.where(determinant > 0, (once * cross - twice * first) / determinant, -low)
        if kind.minima is not None:  # a whole number times dmin: without a sign
            alone = torch.where(twice > 0, cross / twice, 0.0)
            level = (determinant <= 0) & (twice > 0)  # all values alike
            scale, minimum = torch.where((minimum < 0) | level, alone, scale), torch.where(level, 0.0, minimum.clamp(min=0))
        error = _error(x, weight, codes, scale, minimum)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _symmetric(x: Tensor, kind: GgmlCoded, weight: Tensor, overshoot: Sequence[float]) -> Tensor:
    """Best scale of each sub-block by itself; its sign is that which lets the largest magnitude take the longer side of the codes."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
    ends = (float(kind.low), float(kind.high)) if kind.low is not None else (float(IQ4_LEVELS[0]), float(IQ4_LEVELS[-1]))
    step = 1.0 if kind.low is not None else 18.0  # between the outer levels
    best_scale, best = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    none = torch.zeros_like(extreme)
    for end in ends:
        for delta in overshoot:
            found = levels(nearest(x, kind, extreme / (end + step * delta), none), kind)
            weighted = weight * found
            square = (weighted * found).sum(-1)
            scale = torch.where(square > 0, (weighted * x).sum(-1) / square, 0.0)
            error = _error(x, weight, found, scale, none)
            better = error < best
            best_scale, best = torch.where(better, scale, best_scale), torch.where(better, error, best)
    return best_scale


def _whole(values: Tensor, ends: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """An fp16 factor of each block, and whole numbers within `ends`, whose products are nearest to `values` `[blocks, subs]`."""
    if ends is None:  # one sub-block
        return values[:, 0].to(torch.float16), torch.ones_like(values)
    low, high = ends
    extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))[..., 0]
    factor = (extreme / (high if low == 0 else low)).to(torch.float16)
    wide = factor.to(torch.float32)[:, None]
    return factor, torch.where(wide == 0, 0.0, values / wide).round_().clamp_(low, high)


def _product(factor: Tensor, whole: Tensor) -> Tensor:
    return factor.to(torch.float32)[:, None] * whole


def _settled(
    x: Tensor, kind: GgmlCoded, weight: Tensor, codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor, turns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers fitted to the codes and codes to these, at most `turns` times in turns, for as long as either lowers a sub-block's error."""
    assert kind.scales is not None
    wide_d, wide_dmin = d.to(torch.float32)[:, None], dmin.to(torch.float32)[:, None]
    error = _error(x, weight, levels(codes, kind), _product(d, scales), _product(dmin, minima))
    for _ in range(turns):
        level = levels(codes, kind)
        weighted = weight * level
        twice, cross = (weighted * level).sum(-1), (weighted * x).sum(-1)
        new_minima = minima
        if kind.minima is None:
            scale = torch.where(twice > 0, cross / twice, 0.0)
        else:
            total, first, once = weight.expand(x.shape).sum(-1), (weight * x).sum(-1), weighted.sum(-1)
            determinant = total * twice - once * once
            minimum = torch.where(determinant > 0, (once * cross - twice * first) / determinant, 0.0)
            new_minima = torch.where(wide_dmin == 0, 0.0, minimum / wide_dmin).round_().clamp_(*kind.minima)
            # With the minimum rounded, the best scale is another.
            scale = torch.where(twice > 0, (cross + _product(dmin, new_minima) * once) / twice, 0.0)
        new_scales = torch.where(wide_d == 0, 0.0, scale / wide_d).round_().clamp_(*kind.scales)
        new_codes = nearest(x, kind, _product(d, new_scales), _product(dmin, new_minima))
        found = _error(x, weight, levels(new_codes, kind), _product(d, new_scales), _product(dmin, new_minima))
        better = found < error
        error = torch.where(better, found, error)
        scales, minima = torch.where(better, new_scales, scales), torch.where(better, new_minima, minima)
        codes = torch.where(better[..., None], new_codes, codes)
    return codes, scales, minima


def _refined(
    x: Tensor, weight: Tensor, level: Tensor, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor, kind: GgmlCoded
) -> tuple[Tensor, Tensor]:
    """`d` and `dmin` of least squares; those that do not fit fp16 stay."""
    part = level * scales[..., None]
    weighted = weight * part
    twice, cross = (weighted * part).sum((-1, -2)), (weighted * x).sum((-1, -2))
    if not kind.has_minimum:
        found = torch.where(twice > 0, cross / twice, 0.0).to(torch.float16)
        return torch.where(torch.isfinite(found), found, d), dmin
    other = weight * minima[..., None]
    mixed = (weighted * minima[..., None]).sum((-1, -2))
    below, first = (other * minima[..., None]).expand(x.shape).sum((-1, -2)), (other * x).sum((-1, -2))
    determinant = twice * below - mixed * mixed
    solved = determinant > 1e-6 * twice * below
    new_d = torch.where(solved, (below * cross - mixed * first) / determinant, d.to(torch.float32)).to(torch.float16)
    new_dmin = torch.where(solved, (mixed * cross - twice * first) / determinant, dmin.to(torch.float32)).to(torch.float16)
    fits = torch.isfinite(new_d) & torch.isfinite(new_dmin)
    return torch.where(fits, new_d, d), torch.where(fits, new_dmin, dmin)


def _error(x: Tensor, weight: Tensor, level: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Weighted squared error of each sub-block."""
    return (level * scale[..., None]).sub_(minimum[..., None]).sub_(x).square_().mul_(weight).sum(-1)
