"""Quantization of a weight by itself: round to nearest, and parameters of least squared error.

No policy, no packing, no I/O. Methods that need more of the calibration than a weight for each input channel are in `calibration.gptq`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.quantization.codec import Quantized, Rounding, find_codec
from elmexport.quantization.schemes import CodedScheme

# Importance that every input channel has beyond what was measured, as a part of the mean: a channel silent on the calibration text may
# speak up on another.
_IMPORTANCE_FLOOR = 0.01


def quantize(weight: Tensor, scheme: CodedScheme, method: Rounding = "mse", mean_square: Tensor | None = None) -> Quantized:
    """Quantize `weight` `[…, out, in]` (any float dtype) to `scheme`.

    `rtn` takes a scale from the extreme values of its group and rounds to nearest, as ggml's Q4_0 and Q8_0 do. `mse` searches the scale of
    least squared error. With `mean_square`, float32 `[in]`, E[x²] of each input channel, squares are weighted by it, which makes them the error of
    the output as far as channels are uncorrelated. Tables come from k-means, weighted likewise, and have no `rtn`. `quick` is `mse` with a
    shorter search.

    Raises:
        ElmExportError: the shape does not fit the scheme, a parameter does not fit its type, mean squares that are not finite or of another
            length, or a method that the scheme does not have.
    """
    codec = find_codec(scheme)
    codec.check(weight)
    return codec.quantize(weight, method, None if mean_square is None else _importance(mean_square, weight.shape[-1]))


def _importance(mean_square: Tensor, columns: int) -> Tensor:
    """Weights of the input channels, float32 `[in]`, their mean 1 (all 1 where nothing was measured)."""
    if mean_square.shape != (columns,):
        raise ElmExportError(f"moments of {list(mean_square.shape)} input channels do not belong to a weight with {columns}")
    if not (torch.isfinite(mean_square).all() and (mean_square >= 0).all()):
        raise ElmExportError("the calibration's mean squares hold NaN, infinite or negative values; calibrate again")
    mean = mean_square.mean()
    if mean == 0:
        return torch.ones(columns, device=mean_square.device)
    importance = mean_square.to(torch.float32) / mean + _IMPORTANCE_FLOOR
    return importance / importance.mean()
