"""Bytes of quantized matrices as `com.microsoft` MatMulNBits and GatherBlockQuantized read them. No policy, no arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.schemes import PerBlock


def pack_codes(quantized: IntegerTensor) -> NDArray[np.uint8]:
    """Pack codes, unsigned, as uint8 `[out, blocks, bytes of a block]`.

    Symmetric ones have zero point 8 (4 bits) or 128 (8 bits), which both ops assume.
    Of two 4-bit codes in a byte, the earlier one takes the low half.
    """
    assert isinstance(quantized.scheme.granularity, PerBlock), f"MatMulNBits takes blocks, not codes {quantized.scheme.granularity}"
    codes = quantized.codes.view(torch.uint8)  # two's complement: adding the zero point modulo 256 makes the codes unsigned
    rows, blocks = quantized.scales.shape
    if quantized.scheme.width == 8:
        packed = codes ^ 128
    else:
        zero = 8 if quantized.zeros is None else 0  # asymmetric codes are unsigned as they are
        packed = (codes[:, 0::2] + zero) | ((codes[:, 1::2] + zero) << 4)
    result: NDArray[np.uint8] = packed.reshape(rows, blocks, -1).numpy()
    return result


def pack_zeros(zeros: Tensor) -> NDArray[np.uint8]:
    """Pack 4-bit zero points int8 `[out, blocks]` as MatMulNBits reads them: `[out, bytes of a row]`, the earlier one in the low half."""
    even = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2)).view(torch.uint8)
    result: NDArray[np.uint8] = (even[:, 0::2] | (even[:, 1::2] << 4)).numpy()
    return result


def pack_flat(values: Tensor, width: int) -> NDArray[Any]:
    """Pack codes or zero points as ONNX's INT4, UINT4 and INT8 tensors hold them.

    They are in row order, of two 4-bit ones in a byte the earlier one in the low half.
    """
    flat = values.contiguous().view(-1)
    if width == 8:
        return flat.numpy()
    even = torch.nn.functional.pad(flat, (0, len(flat) % 2)).view(torch.uint8)
    return ((even[0::2] & 15) | ((even[1::2] & 15) << 4)).numpy()
