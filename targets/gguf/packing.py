"""Packing of weights to GGUF's bytes: floats as they are, codes and scales as ggml's blocks. No arithmetic but exact widening."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elmexport.quantization.ggml import GGML_TYPES
from elmexport.quantization.ggml_coded import GGML_CODED
from elmexport.quantization.schemes import Float, Integer, PerBlock, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from elmexport.quantization.codec import Quantized

BLOCK = 32  # values in a block of Q8_0, Q5_0 and Q4_0

# GGUF's name for each scheme that a file can hold.
TYPES: Mapping[Scheme, str] = {
    Float("fp32"): "F32",
    Float("fp16"): "F16",
    Float("bf16"): "BF16",
    Integer(8, PerBlock(BLOCK)): "Q8_0",
    Integer(5, PerBlock(BLOCK)): "Q5_0",
    Integer(4, PerBlock(BLOCK)): "Q4_0",
    **{kind: kind.name for kind in GGML_TYPES},
    **{kind: kind.name for kind in GGML_CODED},
}


def pack(weight: Tensor | Quantized) -> NDArray[np.uint8]:
    """The bytes of `weight`, one row of the result for each row `[out, bytes]` (`[bytes]` for a vector)."""
    import torch

    from elmexport.quantization.ggml_codec import BlockTensor
    from elmexport.quantization.integer_codec import IntegerTensor
    from targets.gguf.block_packing import pack_blocks

    if isinstance(weight, torch.Tensor):
        plain: NDArray[np.uint8] = weight.contiguous().view(torch.uint8).numpy()
        return plain
    if isinstance(weight, BlockTensor):
        return pack_blocks(weight)
    assert isinstance(weight, IntegerTensor), f"GGUF has no place for {weight.scheme}"
    codes, scales = weight.codes.numpy(), weight.scales.numpy()
    blocks = codes.reshape(-1, BLOCK)
    packed = {8: _q8_0, 5: _q5_0, 4: _q4_0}[weight.scheme.width](blocks)
    # A block is its fp16 scale, then its codes.
    result = np.empty((len(blocks), 2 + packed.shape[1]), dtype=np.uint8)
    result[:, :2] = scales.reshape(-1, 1).view(np.uint8)
    result[:, 2:] = packed
    return result.reshape(len(codes), -1)


def _q8_0(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Signed bytes, as they are."""
    return codes.view(np.uint8)


def _q5_0(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Code + 16 in five bits: the fifth bits of all codes first, four bytes in the order of the codes, then the others as in Q4_0."""
    unsigned = codes.view(np.uint8) + np.uint8(16)  # modulo 256, so -16 becomes 0
    fifth = np.packbits(unsigned >> np.uint8(4), axis=1, bitorder="little")
    return np.concatenate((fifth, _nibbles(unsigned & np.uint8(15))), axis=1)


def _q4_0(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Code + 8 in four bits."""
    return _nibbles(codes.view(np.uint8) + np.uint8(8))


def _nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Values below 16: the first half of the block in the low nibbles, the second half in the high ones."""
    packed: NDArray[np.uint8] = values[:, : BLOCK // 2] | values[:, BLOCK // 2 :] << np.uint8(4)
    return packed
