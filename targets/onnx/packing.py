"""Bytes of quantized matrices as `com.microsoft` MatMulNBits and GatherBlockQuantized read them. No policy, no arithmetic."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from elmexport.quantization.quantize import QuantizedTensor
from elmexport.quantization.schemes import PerBlock


def pack_codes(quantized: QuantizedTensor) -> NDArray[np.uint8]:
    """Unsigned codes `[out, blocks, bytes of a block]`, zero point 8 (4 bits) or 128 (8 bits), which both ops assume by default.

    Of two 4-bit codes in a byte, the earlier one takes the low half.
    """
    assert isinstance(quantized.scheme.granularity, PerBlock), f"MatMulNBits takes blocks, not codes {quantized.scheme.granularity}"
    codes = quantized.codes.view(torch.uint8)  # two's complement: adding the zero point modulo 256 makes the codes unsigned
    rows, blocks = quantized.scales.shape
    packed = codes ^ 128 if quantized.scheme.width == 8 else (codes[:, 0::2] + 8) | ((codes[:, 1::2] + 8) << 4)
    result: NDArray[np.uint8] = packed.reshape(rows, blocks, -1).numpy()
    return result
