"""Blocks of codes and scales, held against gguf's own quantizer and dequantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from elmexport.quantization.ggml import GgmlType
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import Integer, PerBlock, find_scheme
from elmexport.target import find_target
from elmexport.weights import Role
from targets.gguf import ggml
from targets.gguf.packing import BLOCK, TYPES, pack

INT4, INT5, INT8 = (Integer(width, PerBlock(BLOCK)) for width in (4, 5, 8))
SCALES = st.floats(2**-14, 2**8, width=16)  # fp16's normal numbers, far enough from its end for products to stay finite


def gguf_type(scheme: Integer) -> GGMLQuantizationType:
    return GGMLQuantizationType[TYPES[scheme]]


@st.composite
def quantized(draw: st.DrawFn, scheme: Integer, *, extreme: int | None = None) -> IntegerTensor:
    """Any codes and scales; with `extreme`, each block holds that code, which is what a quantizer takes its scale from."""
    rows, blocks = draw(array_shapes(min_dims=2, max_dims=2, max_side=4))
    low, high = scheme.range
    codes = draw(arrays(np.int8, (rows, blocks * BLOCK), elements=st.integers(low, high)))
    scales = draw(arrays(np.float16, (rows, blocks), elements=SCALES))
    if extreme is not None:
        codes[:, draw(st.integers(0, BLOCK - 1)) :: BLOCK] = extreme
    if scheme.width < 8:
        scales *= draw(st.sampled_from([np.float16(1), np.float16(-1)]))
    return IntegerTensor(scheme, torch.from_numpy(codes), torch.from_numpy(scales))


@given(st.one_of(quantized(INT4), quantized(INT5), quantized(INT8)))
def test_ggufs_dequantizer_gives_our_values(weight: IntegerTensor) -> None:
    values = quants.dequantize(pack(weight), gguf_type(weight.scheme))
    assert np.array_equal(values, weight.dequantize().numpy())


@given(st.one_of(quantized(INT4, extreme=-8), quantized(INT5, extreme=-16), quantized(INT8, extreme=127), quantized(INT8, extreme=-127)))
def test_same_bytes_as_ggufs_quantizer_where_codes_and_scales_are_the_same(weight: IntegerTensor) -> None:
    assert np.array_equal(pack(weight), quants.quantize(weight.dequantize().numpy(), gguf_type(weight.scheme)))


def test_int8_is_ggufs_own_on_real_numbers() -> None:
    x = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    theirs = quants.quantize(x, GGMLQuantizationType.Q8_0)
    ours = pack(quantize(torch.from_numpy(x), INT8))
    # gguf divides by the scale before rounding it to fp16, we by the scale that is stored: a few codes differ by one.
    scale_bytes = np.arange(theirs.shape[1]) % 34 < 2
    assert np.array_equal(ours[:, scale_bytes], theirs[:, scale_bytes])
    difference = ours.view(np.int8)[:, ~scale_bytes].astype(int) - theirs.view(np.int8)[:, ~scale_bytes]
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 0.05


@pytest.mark.parametrize(("scheme", "name"), [(INT4, "ggml-q4_0"), (INT5, "ggml-q5_0"), (INT8, "ggml-q8_0")])
@pytest.mark.parametrize("seed", range(4))
def test_round_to_nearest_is_ggmls_own(scheme: Integer, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((256, 256), dtype=np.float32) * 10 ** rng.uniform(-6, 4, (256, 1)).astype(np.float32)
    x[:8, :40] = 0  # blocks of zeros
    x[8:16] = np.round(x[8:16])  # ties, and extremes of both signs
    kind = find_scheme(name)
    assert isinstance(kind, GgmlType)
    weight = torch.from_numpy(x)
    assert np.array_equal(pack(quantize(weight, scheme, "rtn")), ggml.quantize(weight, kind))


def test_schemes_that_the_format_cannot_hold() -> None:
    target = find_target("gguf")
    assert target.refuses(find_scheme("ggml-q4_k"), Role.FFN_DOWN) is None
    for name in ("int4-block64", "int4-asym-block32", "lut4-tensor", "int5-block64", "int6-block32", "int3-block32"):
        assert (
            target.refuses(find_scheme(name), Role.FFN_DOWN)
            == "stores fp32, fp16, bf16, int8-block32, int5-block32, int4-block32, and ggml's own types"
        )


def test_layout_by_hand() -> None:
    """A block of Q4_0: scale, then value i in the low and value i + 16 in the high nibble of byte i."""
    codes = torch.zeros(1, BLOCK, dtype=torch.int8)
    codes[0, 0], codes[0, 1], codes[0, 16] = -8, 7, 3
    scales = torch.tensor([[-0.5]], dtype=torch.float16)
    packed = pack(IntegerTensor(INT4, codes, scales))
    assert packed.tolist() == [[0x00, 0xB8, 0xB0, 0x8F, *[0x88] * 14]]


def test_layout_of_q5_0_by_hand() -> None:
    """Scale, then bit i of 32 for the fifth bit of code i, then the nibbles of Q4_0."""
    codes = torch.zeros(1, BLOCK, dtype=torch.int8)  # 16 in the file: the fifth bit, nibble 0
    codes[0, 0], codes[0, 9], codes[0, 16], codes[0, 31] = -16, 15, -1, -13
    packed = pack(IntegerTensor(INT5, codes, torch.tensor([[2.0]], dtype=torch.float16)))
    nibbles = [0xF0, *[0] * 8, 0x0F, *[0] * 5, 0x30]
    assert packed.tolist() == [[0x00, 0x40, 0xFE, 0xFF, 0xFE, 0x7F, *nibbles]]


def test_floats_are_their_bytes() -> None:
    values = torch.tensor([[1.0, -2.5], [3e-5, 65504.0]])
    for dtype, bits in ((torch.float32, np.uint32), (torch.float16, np.uint16), (torch.bfloat16, np.uint16)):
        packed: NDArray[np.uint8] = pack(values.to(dtype))
        assert packed.shape == (2, 2 * np.dtype(bits).itemsize)
        assert np.array_equal(packed.view(bits), values.to(dtype).view(getattr(torch, np.dtype(bits).name)).numpy())
    assert pack(torch.ones(5)).shape == (20,)
