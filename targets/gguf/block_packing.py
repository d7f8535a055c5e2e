"""Packing of codes, whole-number scales and fp16 factors to the bytes of ggml's block types.

Layouts: the structs of ggml's ggml-common.h, and the bit order of its dequantize_row_* functions. Everything works on `[blocks, …]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from elmexport.quantization.ggml_codec import BlockTensor

Bytes = NDArray[np.uint8]


class _Blocks:
    """Parts of a `BlockTensor`, block by block: `codes` uint8 counted from the lowest, `scales` and `minima` int8."""

    def __init__(self, weight: BlockTensor) -> None:
        scheme = weight.scheme
        self.codes = (weight.codes.numpy().reshape(-1, scheme.block) - (scheme.low or 0)).astype(np.uint8)
        self.scales, self.minima = (whole.numpy().reshape(len(self.codes), -1) for whole in (weight.scales, weight.minima))
        self.d, self.dmin = (factor.numpy().reshape(-1, 1) for factor in (weight.d, weight.dmin))


def pack_blocks(weight: BlockTensor) -> Bytes:
    """The bytes `[out, bytes of a row]` of `weight`."""
    parts = _PACKERS[weight.scheme.name](_Blocks(weight))
    packed = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)
    assert packed.shape[1] == weight.scheme.block_bytes
    return packed.reshape(len(weight.codes), -1)


def _pairs(codes: Bytes, run: int) -> Bytes:
    """Four-bit codes: of every 2 * `run`, the first half in the low nibbles and the second in the high ones."""
    halves = codes.reshape(len(codes), -1, 2, run)
    packed: Bytes = halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)
    return packed.reshape(len(codes), -1)


def _interleaved(codes: Bytes, run: int, width: int) -> Bytes:
    """Codes of `width` bits: byte i of a stretch has those of i, i + `run`, i + 2 * `run`, …, low bits first."""
    count = 8 // width
    stretches = codes.reshape(len(codes), -1, count, run)
    packed = np.zeros((*stretches.shape[:2], run), dtype=np.uint8)
    for i in range(count):
        packed |= stretches[:, :, i] << np.uint8(width * i)
    return packed.reshape(len(codes), -1)


def _six_bit_pairs(scales: NDArray[np.int8], minima: NDArray[np.int8]) -> Bytes:
    """Eight scales and eight minima of six bits in twelve bytes (ggml's get_scale_min_k4)."""
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    four, six = np.uint8(4), np.uint8(6)
    first = s[:, :4] | (s[:, 4:] >> four) << six
    second = m[:, :4] | (m[:, 4:] >> four) << six
    third = (s[:, 4:] & np.uint8(15)) | (m[:, 4:] & np.uint8(15)) << four
    return np.concatenate((first, second, third), axis=1)


def _q4_1(b: _Blocks) -> list[NDArray[np.generic]]:
    return [b.d, -b.dmin, _pairs(b.codes, 16)]


def _q5_1(b: _Blocks) -> list[NDArray[np.generic]]:
    fifth = np.packbits(b.codes >> np.uint8(4), axis=1, bitorder="little")
    return [b.d, -b.dmin, fifth, _pairs(b.codes & np.uint8(15), 16)]


def _q2_k(b: _Blocks) -> list[NDArray[np.generic]]:
    both = b.scales.astype(np.uint8) | b.minima.astype(np.uint8) << np.uint8(4)
    return [both, _interleaved(b.codes, 32, 2), b.d, b.dmin]


def _q3_k(b: _Blocks) -> list[NDArray[np.generic]]:
    scales = (b.scales + 32).astype(np.uint8)
    low = (scales[:, :8] & np.uint8(15)) | (scales[:, 8:] & np.uint8(15)) << np.uint8(4)
    third = _interleaved(b.codes >> np.uint8(2), 32, 1)
    return [third, _interleaved(b.codes & np.uint8(3), 32, 2), low, _interleaved(scales >> np.uint8(4), 4, 2), b.d]


def _q4_k(b: _Blocks) -> list[NDArray[np.generic]]:
    return [b.d, b.dmin, _six_bit_pairs(b.scales, b.minima), _pairs(b.codes, 32)]


def _q5_k(b: _Blocks) -> list[NDArray[np.generic]]:
    fifth = _interleaved(b.codes >> np.uint8(4), 32, 1)
    return [b.d, b.dmin, _six_bit_pairs(b.scales, b.minima), fifth, _pairs(b.codes & np.uint8(15), 32)]


def _q6_k(b: _Blocks) -> list[NDArray[np.generic]]:
    low, high = b.codes & np.uint8(15), b.codes >> np.uint8(4)
    return [_pairs(low, 64), _interleaved(high, 32, 2), b.scales.astype(np.int8), b.d]


def _iq4_nl(b: _Blocks) -> list[NDArray[np.generic]]:
    return [b.d, _pairs(b.codes, 16)]


def _iq4_xs(b: _Blocks) -> list[NDArray[np.generic]]:
    scales = (b.scales + 32).astype(np.uint8)
    high = np.zeros((len(scales), 1), dtype=np.uint16)
    for i in range(8):
        high |= (scales[:, i : i + 1] >> np.uint8(4)).astype(np.uint16) << np.uint16(2 * i)
    low = scales & np.uint8(15)
    return [b.d, high, low[:, ::2] | low[:, 1::2] << np.uint8(4), _pairs(b.codes, 16)]


_PACKERS: Mapping[str, Callable[[_Blocks], list[NDArray[np.generic]]]] = {
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
