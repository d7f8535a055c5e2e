"""Rounding to integers: scales from extreme values (round to nearest), or of least squared error.

Everything here works on float32 `x` `[rows, groups, block]`, a group being the values that share a scale, and returns codes int8 of that
shape, scales float16 `[rows, groups]`, and zero points int8 `[rows, groups]` (None where the scheme is symmetric).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elmexport.quantization.schemes import Integer

# The value of largest magnitude in a group is mapped to codes at these distances from the lowest and from the highest one in turn, and the
# scale with the least squared error is kept. The low side of the range is the longer one; codes beyond the range clip the value.
_FROM_LOW = (0.0, -1.0, -0.5, 0.5, 1.0, 1.5)
_FROM_HIGH = (0.0, 1.0, 0.5, -0.5, -1.0)
_FROM_LOW_IF_LONG = (-1.5, -2.0, -2.5, -3.0, -4.0, -5.0, -6.5)
_FROM_HIGH_IF_LONG = (2.0, 3.0, 4.0)
_QUICK = (0.0, -0.5, -1.5, -3.0)  # of those from the lowest code, all that a quick search tries, with the highest code itself
_LONG = 33  # values; the more there are, the further the extreme one lies from the rest
# Parts of the distances from zero to a group's smallest and largest value that asymmetric codes span.
_SPANS = (1.0, 0.92, 0.84, 0.75)

Coded = tuple[Tensor, Tensor, Tensor | None]


def round_to_nearest(x: Tensor, scheme: Integer) -> Coded:
    """Round to nearest with scales from the extreme values alone; codes are for the scale before it is rounded to fp16.

    Blocks of 32 are ggml's `quantize_row_q4_0_ref`, `quantize_row_q5_0_ref` and `quantize_row_q8_0_ref`, bit for bit: below 8 bits the value of
    largest magnitude is mapped to the lowest code and halves round up, 8 bits map it to ±127 and round halves away from zero.
    """
    if not scheme.symmetric:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low * _inverse(scale)).round_().clamp_(0, 15)
        codes = (x * _inverse(scale)[..., None]).round_().add_(zero[..., None]).clamp_(0, 15)
        return codes.to(torch.int8), scale.to(torch.float16), zero.to(torch.int8)
    extreme = _extreme(x)
    if scheme.width < 8:
        lowest, highest = scheme.range
        scale = (extreme + 0.0) / lowest  # a block of zeros, whatever their signs, has the scale that ggml gives it
        # Product and sum each rounded to float32, as ggml's library does it; gguf-py's numpy version rounds once, and differs on ties.
        codes = (x * _inverse(scale)[..., None]).add_(0.5 - lowest).trunc_().clamp_(0, highest - lowest).add_(lowest)
    else:
        scale = extreme.abs() / 127
        ratio = x * _inverse(scale)[..., None]
        whole = ratio.trunc()
        codes = whole + ((ratio - whole).abs() >= 0.5) * ratio.sign()
    return codes.to(torch.int8), scale.to(torch.float16), None


def least_squares(x: Tensor, scheme: Integer, importance: Tensor | None = None, *, quick: bool = False) -> Coded:
    """Search the scale of least squared error among candidates (few if `quick`); refine it once by least squares given the codes.

    Codes are nearest for the scale as stored (fp16), so every format that holds the same codes and scales dequantizes to the same numbers.
    Symmetric 8-bit codes are fine enough for the largest magnitude to become code 127. `importance` `[groups, block]` weights the squares.
    """
    if not scheme.symmetric:
        return _least_squares_asymmetric(x, importance, _SPANS[::2] if quick else _SPANS)
    low, high = scheme.range
    extreme = _extreme(x)
    if scheme.width == 8:
        scale = (extreme.abs() / high).to(torch.float16)
        return _codes(x, scale, low, high).to(torch.int8), scale, None
    best_scale = torch.zeros_like(extreme, dtype=torch.float16)
    best_error = torch.full_like(extreme, torch.inf)
    for code in (*(low + distance for distance in _QUICK), high) if quick else _extreme_codes(low, high, x.shape[-1]):
        _keep_better(x, importance, (extreme / code).to(torch.float16), low, high, best_scale, best_error)
    codes = _codes(x, best_scale, low, high)
    # With the codes fixed, the least-squares scale is <x, codes> / <codes, codes>.
    weighted = codes if importance is None else codes * importance
    square = (weighted * codes).sum(-1)
    refined = torch.where(square > 0, (weighted * x).sum(-1) / square, 0.0)
    _keep_better(x, importance, refined.to(torch.float16), low, high, best_scale, best_error)
    return _codes(x, best_scale, low, high).to(torch.int8), best_scale, None


def _least_squares_asymmetric(x: Tensor, importance: Tensor | None, spans: Sequence[float]) -> Coded:
    bottom, top = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    best_error = torch.full_like(top, torch.inf)
    best_scale, best_zero = torch.zeros_like(top, dtype=torch.float16), torch.zeros_like(top)
    for lower in spans:
        for upper in spans:
            scale = ((top * upper - bottom * lower) / 15).to(torch.float16)
            zero = (-bottom * lower * _inverse(scale)).round_().clamp_(0, 15)
            _keep_better_asymmetric(x, importance, scale, zero, best_scale, best_zero, best_error)
    offset = _codes(x, best_scale, -best_zero[..., None], 15 - best_zero[..., None])
    weighted = offset if importance is None else offset * importance
    square = (weighted * offset).sum(-1)
    refined = torch.where(square > 0, (weighted * x).sum(-1) / square, 0.0).to(torch.float16)
    _keep_better_asymmetric(x, importance, refined, best_zero.clone(), best_scale, best_zero, best_error)
    offset = _codes(x, best_scale, -best_zero[..., None], 15 - best_zero[..., None])
    return (offset + best_zero[..., None]).to(torch.int8), best_scale, best_zero.to(torch.int8)


def _keep_better(
    x: Tensor, importance: Tensor | None, scale: Tensor, low: float, high: float, best_scale: Tensor, best_error: Tensor
) -> None:
    """Where `scale` gives a smaller squared error than the best so far, take it (in place)."""
    error = _error(x, importance, _codes(x, scale, low, high), scale)
    better = error < best_error
    best_scale.copy_(torch.where(better, scale, best_scale))
    best_error.copy_(torch.where(better, error, best_error))


def _keep_better_asymmetric(
    x: Tensor, importance: Tensor | None, scale: Tensor, zero: Tensor, best_scale: Tensor, best_zero: Tensor, best_error: Tensor
) -> None:
    error = _error(x, importance, _codes(x, scale, -zero[..., None], 15 - zero[..., None]), scale)
    better = error < best_error
    for best, found in ((best_scale, scale), (best_zero, zero), (best_error, error)):
        best.copy_(torch.where(better, found, best))


def _error(x: Tensor, importance: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
    """(Weighted) squared error of each group; `codes` (less their zero points) are used up."""
    squares = codes.mul_(scale.to(torch.float32)[..., None]).sub_(x).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(-1)


def _extreme_codes(low: int, high: int, values: int) -> tuple[float, ...]:
    """Codes to try for the value of largest magnitude of a group of `values`."""
    codes = (*(low + distance for distance in _FROM_LOW), *(high + distance for distance in _FROM_HIGH))
    if values < _LONG:
        return codes
    return (*codes, *(low + distance for distance in _FROM_LOW_IF_LONG), *(high + distance for distance in _FROM_HIGH_IF_LONG))


def _extreme(x: Tensor) -> Tensor:
    """The value of largest magnitude of each group, with its sign; the first of several."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]


def _codes(x: Tensor, scale: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Nearest codes, as float32. A scale of zero (an all-zero group, or one below fp16's smallest number) gives zero codes."""
    codes = (x * _inverse(scale)[..., None]).round_()
    return torch.clamp(codes, low, high, out=codes) if isinstance(low, Tensor) else codes.clamp_(low, high)  # type: ignore[arg-type]


def _inverse(scale: Tensor) -> Tensor:
    """`1 / scale` in float32, 0 where that is infinite."""
    inverse = scale.to(torch.float32).reciprocal()
    return torch.where(inverse.isinf(), 0.0, inverse)
