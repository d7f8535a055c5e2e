"""Arithmetic of quantization: from numbers to codes and scales, and back. No policy, no packing, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.quantization.schemes import Integer, PerBlock

# The value of largest magnitude in a granule is mapped to each of these codes in turn, and the scale with the least squared error is
# kept. Negative entries send it to the longer, negative side of the range.
_CANDIDATES_4_BIT = (-8.0, -9.0, -8.5, -7.5, -7.0, -6.5, 7.0, 8.0, 7.5, 6.5, 6.0)
_CHUNK = 1 << 18  # values handled at a time: small enough for the temporaries to stay in a core's cache


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix as codes and scales.

    `codes` int8 `[out, in]`; `scales` float16 `[out, granules]`, where a granule is a block (`PerBlock`) or the whole row
    (`PerChannel`). `value = codes * scales`, exact in float32 (a code has at most 8 bits, a scale 11).
    """

    scheme: Integer
    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """float32 `[out, in]`."""
        rows, granules = self.scales.shape
        values = self.codes.view(rows, granules, -1).to(torch.float32) * self.scales.to(torch.float32)[:, :, None]
        return values.view(self.codes.shape)

    def scaled(self, factor: float) -> QuantizedTensor:
        """The tensor times a power of two, exactly.

        Raises:
            ElmExportError: an fp16 scale would overflow, or lose bits to underflow.
        """
        scales = self.scales.to(torch.float32) * factor
        rounded = scales.to(torch.float16)
        if not torch.equal(rounded.to(torch.float32), scales):
            raise ElmExportError(
                f"scales down to {float(self.scales.abs()[self.scales != 0].min()):.3g} cannot be multiplied by {factor:g} exactly in fp16; "
                "the residual rescaling leaves no room for these weights in fp16 scales"
            )
        return replace(self, scales=rounded)


def quantize(weight: Tensor, scheme: Integer) -> QuantizedTensor:
    """Quantize `weight` `[out, in]` to `scheme`.

    8 bits: the largest magnitude of a granule becomes code 127. 4 bits: the fp16 scale of least squared error among a fixed set of
    candidates, refined once by least squares given the codes. Codes are rounded to nearest for the scale as stored (fp16), so every
    format that holds the same codes and scales dequantizes to the same numbers.

    Raises:
        ElmExportError: the shape does not fit the scheme, or a scale does not fit fp16.
    """
    reason = scheme.refuses(tuple(weight.shape))
    if reason is not None:
        raise ElmExportError(f"a tensor of shape {list(weight.shape)} cannot be quantized to {scheme}: {reason}")
    rows, columns = weight.shape
    # Checked before the search: it would take an overflowing scale for a bad candidate, and end at zero.
    largest = max(abs(float(end)) for end in weight.aminmax())
    reach = 65504 * max(map(abs, scheme.range))
    if largest > reach:
        raise ElmExportError(
            f"the largest weight, {largest:.3g}, needs a scale that exceeds fp16's 65504 (codes reach {reach:.3g}); export this checkpoint in a float format"
        )
    block = scheme.granularity.size if isinstance(scheme.granularity, PerBlock) else columns
    granules = weight.reshape(-1, block)
    codes = torch.empty(granules.shape, dtype=torch.int8)
    scales = torch.empty(len(granules), dtype=torch.float16)
    step = max(1, _CHUNK // block)

    def work(start: int) -> None:
        part = slice(start, start + step)
        codes[part], scales[part] = _quantize_granules(granules[part].to(torch.float32), scheme)

    _in_threads(work, range(0, len(granules), step))
    return QuantizedTensor(scheme, codes.view(rows, columns), scales.view(rows, -1))


def _in_threads(work: Callable[[int], None], starts: Sequence[int]) -> None:
    """Call `work` on every start, on as many threads as torch would use, each running its ops alone.

    Threads inside ops would meet after every one of some eighty short ops a chunk; whole chunks to a thread are twice as fast.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def run(start: int) -> None:
        with torch.inference_mode(inference):  # a mode of the calling thread, which the workers must share to write its tensors
            work(start)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, starts))
    finally:
        torch.set_num_threads(threads)


def _quantize_granules(x: Tensor, scheme: Integer) -> tuple[Tensor, Tensor]:
    """Codes int8 `[n, block]` and scales float16 `[n]` of float32 `x` `[n, block]`."""
    low, high = scheme.range
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    if scheme.width == 8:
        scale = (extreme.abs() / high).to(torch.float16)
        return _codes(x, scale, low, high).to(torch.int8), scale[:, 0]
    best_scale = torch.zeros_like(extreme, dtype=torch.float16)
    best_error = torch.full_like(extreme, torch.inf)
    for code in _CANDIDATES_4_BIT:
        _keep_better(x, (extreme / code).to(torch.float16), low, high, best_scale, best_error)
    codes = _codes(x, best_scale, low, high)
    # With the codes fixed, the least-squares scale is <x, codes> / <codes, codes>.
    refined = (x * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp(min=1)
    _keep_better(x, refined.to(torch.float16), low, high, best_scale, best_error)
    return _codes(x, best_scale, low, high).to(torch.int8), best_scale[:, 0]


def _keep_better(x: Tensor, scale: Tensor, low: int, high: int, best_scale: Tensor, best_error: Tensor) -> None:
    """Where `scale` gives a smaller squared error than the best so far, take it (in place)."""
    error = (_codes(x, scale, low, high).mul_(scale.to(torch.float32)).sub_(x)).square_().sum(1, keepdim=True)
    better = error < best_error
    best_scale.copy_(torch.where(better, scale, best_scale))
    best_error.copy_(torch.where(better, error, best_error))


def _codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Nearest codes, as float32. A scale of zero (an all-zero granule, or one below fp16's smallest number) gives zero codes."""
    wide = scale.to(torch.float32)
    inverse = torch.where(wide == 0, 0.0, wide.reciprocal())
    return (x * inverse).round_().clamp_(low, high)
