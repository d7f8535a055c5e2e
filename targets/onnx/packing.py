"""Bytes of quantized matrices as `com.microsoft` MatMulNBits and GatherBlockQuantized read them. No policy, no arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def pack_signed(codes: Tensor, width: int) -> NDArray[Any]:
    """Codes as ONNX's INT4 or INT8 tensors hold them: signed, in row order, of two 4-bit codes in a byte the earlier one in the low half."""
    flat = codes.contiguous().view(-1)
    if width == 8:
        return flat.numpy()
    low, high = flat[0::2].view(torch.uint8) & 15, flat[1::2].view(torch.uint8) & 15
    return (low | (high << 4)).numpy()
