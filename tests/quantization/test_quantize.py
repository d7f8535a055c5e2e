"""The arithmetic of quantization, against gguf's own quantizers and against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.quantization.quantize import QuantizedTensor, quantize
from elmexport.quantization.schemes import SCHEMES, Integer

INT4, INT8, INT8_CHANNEL = (SCHEMES[name] for name in ("int4-block32", "int8-block32", "int8-channel"))
SCHEMES_UNDER_TEST = {"int4-block32": INT4, "int8-block32": INT8, "int8-channel": INT8_CHANNEL}

# Matrices of whole blocks; values from 1e-6 to 1e4 of both signs, exact zeros and repeated extremes among them.
MATRICES = st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda size: arrays(
        np.float32,
        (size[0], 32 * size[1]),
        elements=st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, 1e-6, -1e-6, 1e4, -1e4])),
    )
)


def normal(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def run(x: NDArray[np.float32], scheme: Integer) -> QuantizedTensor:
    return quantize(torch.from_numpy(x), scheme)


def block_errors(values: NDArray[np.floating], x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared error of each block of 32."""
    return np.square(values.astype(np.float64) - x).reshape(-1, 32).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES_UNDER_TEST.values(), ids=SCHEMES_UNDER_TEST)
@given(x=MATRICES)
@settings(max_examples=60, deadline=None)
def test_definition(scheme: Integer, x: NDArray[np.float32]) -> None:
    """Shapes and ranges; `dequantize` is codes times scales; each code is the nearest to its value, given the stored scale."""
    q = run(x, scheme)
    low, high = scheme.range
    granules = scheme.granularity.scales(x.shape)
    assert q.codes.shape == x.shape and q.codes.dtype == torch.int8
    assert q.scales.shape == (len(x), granules // len(x)) and q.scales.dtype == torch.float16
    assert low <= int(q.codes.min()) and int(q.codes.max()) <= high
    scales = np.repeat(q.scales.numpy().astype(np.float64), x.shape[1] // q.scales.shape[1], axis=1)
    codes = q.codes.numpy().astype(np.float64)
    np.testing.assert_array_equal(q.dequantize().numpy(), codes * scales)
    assert np.all(codes[scales == 0] == 0)
    ratio = np.divide(x, scales, out=np.zeros(x.shape), where=scales != 0)
    assert np.all(np.abs(codes - np.clip(ratio, low, high)) <= 0.5 + 1e-4)


@given(x=MATRICES)
@settings(max_examples=60, deadline=None)
def test_int8_scales_are_those_of_gguf(x: NDArray[np.float32]) -> None:
    """Scales equal Q8_0's bit for bit. gguf picks codes for the scale before it is rounded to fp16, we for the scale as stored: ours differ
    by one at most, and are never the worse ones."""
    packed = quants.quantize(x, GGMLQuantizationType.Q8_0).reshape(-1, 34)
    theirs = packed[:, 2:].view(np.int8)
    q = run(x, INT8)
    np.testing.assert_array_equal(q.scales.numpy().reshape(-1).view(np.uint16), packed[:, :2].copy().view(np.uint16)[:, 0])
    big = q.scales.numpy().reshape(-1) > 1e-4  # below, fp16 scales are subnormal and a code can be far off in gguf's way
    assert np.abs(q.codes.numpy().reshape(-1, 32).astype(int) - theirs)[big].max(initial=0) <= 1
    expected = block_errors(quants.dequantize(packed.reshape(len(x), -1), GGMLQuantizationType.Q8_0), x)
    assert np.all(block_errors(q.dequantize().numpy(), x) <= expected * (1 + 1e-5) + 1e-30)


@given(x=MATRICES)
@settings(max_examples=60, deadline=None)
def test_int4_error_is_never_above_q4_0_in_any_block(x: NDArray[np.float32]) -> None:
    packed = quants.quantize(x, GGMLQuantizationType.Q4_0)
    expected = block_errors(quants.dequantize(packed, GGMLQuantizationType.Q4_0), x)
    assert np.all(block_errors(run(x, INT4).dequantize().numpy(), x) <= expected * (1 + 1e-5) + 1e-30)


def test_the_search_pays() -> None:
    """On normal weights the searched scales cut the squared error of round-to-nearest Q4_0 by at least a tenth."""
    x = normal(64, 1024)
    plain = block_errors(quants.dequantize(quants.quantize(x, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0), x).sum()
    assert block_errors(run(x, INT4).dequantize().numpy(), x).sum() < 0.9 * plain


def test_scales_take_either_sign() -> None:
    x = np.zeros((2, 32), dtype=np.float32)
    x[0, 3], x[1, 3] = -8.0, 8.0
    x[:, 4:11] = np.arange(1, 8)
    x[1] = -x[0]
    q = run(x, INT4)
    assert q.scales[0, 0] == 1 and q.scales[1, 0] == -1
    assert torch.equal(q.dequantize(), torch.from_numpy(x))
    assert q.codes[0, 3] == q.codes[1, 3] == -8
    assert (run(x, INT8).scales > 0).all()


@pytest.mark.parametrize("scheme", SCHEMES_UNDER_TEST.values(), ids=SCHEMES_UNDER_TEST)
def test_zeros_stay_zeros(scheme: Integer) -> None:
    x = normal(3, 96)
    x[1] = 0
    x[2, 32:64] = 0
    q = run(x, scheme)
    values = q.dequantize().numpy()
    assert np.all(values[1] == 0) and np.all(values[2, 32:64] == 0)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("scheme", SCHEMES_UNDER_TEST.values(), ids=SCHEMES_UNDER_TEST)
def test_values_below_the_smallest_scale_become_zero(scheme: Integer) -> None:
    x = np.full((1, 32), 1e-8, dtype=np.float32)  # fp16 ends at 6e-8
    assert torch.equal(run(x, scheme).dequantize(), torch.zeros(1, 32))


@pytest.mark.parametrize("scheme", SCHEMES_UNDER_TEST.values(), ids=SCHEMES_UNDER_TEST)
@pytest.mark.parametrize("extreme", [1e7, -1e7, 1e30, -3e38])
def test_values_beyond_the_largest_scale_are_refused(scheme: Integer, extreme: float) -> None:
    x = normal(4, 64)
    x[2, 40] = extreme
    with pytest.raises(ElmExportError, match=r"exceeds? fp16's 65504 .*export this checkpoint in a float format"):
        run(x, scheme)


@pytest.mark.parametrize("scheme", SCHEMES_UNDER_TEST.values(), ids=SCHEMES_UNDER_TEST)
def test_large_values_within_reach_are_kept(scheme: Integer) -> None:
    low, _ = scheme.range
    x = normal(2, 64)
    x[0, 5] = 65000.0 * low
    values = run(x, scheme).dequantize().numpy()
    assert values[0, 5] == pytest.approx(x[0, 5], rel=1e-3)


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ElmExportError, match=r"shape \[2, 33\] cannot be quantized to 4-bit .*: rows of 33 values do not divide into blocks of 32"
    ):
        run(normal(2, 33), INT4)


@pytest.mark.parametrize("scheme", SCHEMES_UNDER_TEST.values(), ids=SCHEMES_UNDER_TEST)
def test_a_large_matrix_is_no_different_from_its_rows(scheme: Integer) -> None:
    """Quantization works through a matrix in chunks; a chunk's edge must not show."""
    x = normal(300, 1024)
    whole = run(x, scheme)
    for row in (0, 127, 128, 255, 256, 299):
        single = run(x[row : row + 1], scheme)
        assert torch.equal(whole.codes[row : row + 1], single.codes)
        assert torch.equal(whole.scales[row : row + 1], single.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_read_exactly(dtype: torch.dtype) -> None:
    x = torch.from_numpy(normal(4, 64)).to(dtype)
    found, expected = quantize(x, INT4), quantize(x.float(), INT4)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("scheme", SCHEMES_UNDER_TEST.values(), ids=SCHEMES_UNDER_TEST)
@pytest.mark.parametrize("factor", [2.0**-4, 1.0, 2.0**5])
def test_scaled_by_a_power_of_two_is_exact(scheme: Integer, factor: float) -> None:
    q = run(normal(4, 64), scheme)
    scaled = q.scaled(factor)
    assert torch.equal(scaled.codes, q.codes)
    assert torch.equal(scaled.dequantize(), q.dequantize() * factor)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20, 1 / 3])
def test_scaling_that_would_round_is_refused(factor: float) -> None:
    with pytest.raises(ElmExportError, match="exactly in fp16"):
        run(normal(4, 64), INT4).scaled(factor)
