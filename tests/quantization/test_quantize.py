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
from elmexport.quantization.codec import Rounding
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import Integer, find_scheme

INT4, INT5, INT8 = (find_scheme(name) for name in ("int4-block32", "int5-block32", "int8-block32"))
GGML = {"q4_0": (INT4, GGMLQuantizationType.Q4_0), "q5_0": (INT5, GGMLQuantizationType.Q5_0), "q8_0": (INT8, GGMLQuantizationType.Q8_0)}
INT4_ASYM = find_scheme("int4-asym-block32")
NAMES = ("int4-block32", "int8-block32", "int8-channel", "int4-block16", "int4-channel", "int3-block32", "int5-block32", "int6-channel")
SCHEMES_UNDER_TEST = {name: find_scheme(name) for name in NAMES}

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


def run(x: NDArray[np.float32], scheme: Integer) -> IntegerTensor:
    return quantize(torch.from_numpy(x), scheme)


def block_errors(values: NDArray[np.floating], x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared error of each block of 32."""
    return np.square(values.astype(np.float64) - x).reshape(-1, 32).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES_UNDER_TEST.values(), ids=SCHEMES_UNDER_TEST)
@given(x=MATRICES)
@settings(max_examples=60, deadline=None)
def test_definition(scheme: Integer, x: NDArray[np.float32]) -> None:
    """Shapes and ranges; `dequantize` is codes times scales; each code is the nearest to its value, given the stored scale."""
    q = run(x, scheme)
    low, high = scheme.range
    groups = scheme.granularity.count(x.shape)
    assert q.codes.shape == x.shape and q.codes.dtype == torch.int8
    assert q.scales.shape == (len(x), groups // len(x)) and q.scales.dtype == torch.float16
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


def ggml_blocks(x: NDArray[np.float32], kind: GGMLQuantizationType) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Codes `[out, in]` and the bits of the scales `[out, blocks]` as gguf's quantizer (ggml's reference, written in numpy) packs them."""
    packed = quants.quantize(x, kind).reshape(len(x), x.shape[1] // 32, -1)
    scales, data = packed[..., :2].copy().view(np.uint16)[..., 0], packed[..., 2:]
    if kind is GGMLQuantizationType.Q8_0:
        return data.view(np.int8).reshape(x.shape), scales
    fifth = np.unpackbits(data[..., :4], axis=-1, bitorder="little") if kind is GGMLQuantizationType.Q5_0 else np.uint8(0)
    nibbles = data[..., -16:]
    codes = (np.concatenate((nibbles & 15, nibbles >> 4), -1) | fifth << 4).astype(np.int8) - (
        16 if kind is GGMLQuantizationType.Q5_0 else 8
    )
    return codes.reshape(x.shape), scales


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "kind"), GGML.values(), ids=GGML)
@given(x=MATRICES)
@settings(max_examples=200, deadline=None)
def test_rtn_is_ggmls_own_bit_for_bit(scheme: Integer, kind: GGMLQuantizationType, x: NDArray[np.float32]) -> None:
    assert_ggmls(scheme, kind, np.where(np.abs(x) < 1e-30, np.float32(0), x))  # below, ggml divides by subnormals: undefined codes, scale 0


@pytest.mark.parametrize(("scheme", "kind"), GGML.values(), ids=GGML)
@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-7, 300.0])
def test_rtn_is_ggmls_own_on_many_numbers(scheme: Integer, kind: GGMLQuantizationType, factor: float) -> None:
    x = normal(512, 1024) * np.float32(factor)
    assert_ggmls(scheme, kind, x)
    assert_ggmls(scheme, kind, x.astype(np.float16).astype(np.float32))  # with ties and halves, as checkpoints have them


def assert_ggmls(scheme: Integer, kind: GGMLQuantizationType, x: NDArray[np.float32]) -> None:
    codes, scales = ggml_blocks(x, kind)
    q = quantize(torch.from_numpy(x), scheme, "rtn")
    np.testing.assert_array_equal(q.scales.numpy().view(np.uint16), scales)
    np.testing.assert_array_equal(q.codes.numpy(), codes)


@pytest.mark.parametrize("name", ["q4_0", "q5_0"])
@given(x=MATRICES)
@settings(max_examples=60, deadline=None)
def test_error_is_never_above_ggmls_in_any_block(name: str, x: NDArray[np.float32]) -> None:
    scheme, kind = GGML[name]
    expected = block_errors(quants.dequantize(quants.quantize(x, kind), kind), x)
    assert np.all(block_errors(run(x, scheme).dequantize().numpy(), x) <= expected * (1 + 1e-5) + 1e-30)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int3-block32", "int5-block32", "int6-block32", "int6-channel"])
@given(x=MATRICES)
@settings(max_examples=60, deadline=None)
def test_rounded_to_nearest(name: str, x: NDArray[np.float32]) -> None:
    """In float64: the scale maps the value of largest magnitude to the lowest code, and no value that is not clipped is more than half a step off."""
    scheme = find_scheme(name)
    q = quantize(torch.from_numpy(x), scheme, "rtn")
    low, high = scheme.range
    assert q.scales.dtype == torch.float16 and low <= int(q.codes.min()) and int(q.codes.max()) <= high
    groups = x.astype(np.float64).reshape(-1, x.size // q.scales.numel())
    codes, scales = q.codes.numpy().reshape(groups.shape), q.scales.numpy().astype(np.float64).reshape(-1, 1)
    extreme = groups[np.arange(len(groups)), np.abs(groups).argmax(1)][:, None]
    np.testing.assert_allclose(scales, extreme / low, rtol=2**-11, atol=2**-25)
    usable = np.abs(scales[:, 0]) > 2**-14  # below, fp16 has fewer bits
    ratio = groups[usable] / (extreme / low)[usable]
    assert np.abs(codes[usable] - np.clip(ratio, low, high)).max(initial=0) <= 0.5 + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "mse"])
@given(x=MATRICES)
@settings(max_examples=60, deadline=None)
def test_asymmetric_definition(method: Rounding, x: NDArray[np.float32]) -> None:
    """Codes and zero points in 0..15; no value further from its own than a step and what clipping allows in `rtn`: nothing is clipped."""
    q = quantize(torch.from_numpy(x), INT4_ASYM, method)
    assert q.zeros is not None and q.zeros.shape == q.scales.shape
    for tensor in (q.codes, q.zeros):
        assert tensor.dtype == torch.int8 and int(tensor.min()) >= 0 and int(tensor.max()) <= 15
    scales = np.repeat(q.scales.numpy().astype(np.float64), 32, axis=1)
    expected = (q.codes.numpy().astype(np.float64) - np.repeat(q.zeros.numpy(), 32, axis=1)) * scales
    np.testing.assert_array_equal(q.dequantize().numpy(), expected)
    if method == "rtn":
        blocks = x.reshape(-1, 32).astype(np.float64)
        step = (np.maximum(blocks.max(1), 0) - np.minimum(blocks.min(1), 0)) / 15
        # Half a step, half more where the rounded zero point shifts the range, and what fp16 takes from the scale.
        allowed = np.where(step < 1e-4, 16 * step, step * 1.02)[:, None]
        assert np.all(np.abs(q.dequantize().numpy().reshape(-1, 32) - blocks) <= allowed + 1e-30)


def test_asymmetric_codes_suit_a_one_sided_block() -> None:
    x = np.abs(normal(64, 256))
    errors = {
        (name, method): block_errors(quantize(torch.from_numpy(x), find_scheme(name), method).dequantize().numpy(), x).sum()
        for name in ("int4-block32", "int4-asym-block32")
        for method in ("rtn", "mse")
    }
    assert errors["int4-asym-block32", "rtn"] < 0.5 * errors["int4-block32", "rtn"]
    assert errors["int4-asym-block32", "mse"] < 0.5 * errors["int4-block32", "mse"]
    assert errors["int4-asym-block32", "mse"] < errors["int4-asym-block32", "rtn"]


@pytest.mark.parametrize("name", ["int4-block32", "int4-block128", "int4-channel", "int4-asym-block32"])
def test_weighted_squares_are_smaller_where_they_weigh(name: str) -> None:
    x = torch.from_numpy(normal(128, 512))
    weight = torch.from_numpy(np.random.default_rng(1).lognormal(sigma=1.5, size=512).astype(np.float32))
    plain, weighted = (quantize(x, find_scheme(name), "mse", m).dequantize() for m in (None, weight))
    assert ((weighted - x).square() @ weight).sum() < 0.97 * ((plain - x).square() @ weight).sum()
    assert (weighted - x).square().sum() > (plain - x).square().sum()


@pytest.mark.parametrize("name", ["int4-block128", "int4-channel", "int4-asym-block128", "int3-block128", "int5-block128", "int6-block128"])
def test_scales_are_near_the_best_of_a_fine_search(name: str) -> None:
    """Within 2 % of the squared error that the best of 400 scales gives (for asymmetric codes: at its zero point)."""
    x = normal(32, 512)
    q = quantize(torch.from_numpy(x), find_scheme(name))
    groups = x.reshape(-1, x.size // q.scales.numel()).astype(np.float64)
    found = np.square(q.dequantize().numpy().reshape(groups.shape) - groups).sum(1)
    zero = np.zeros((len(groups), 1)) if q.zeros is None else q.zeros.numpy().reshape(-1, 1)
    low, high = q.scheme.range
    best = np.full(len(groups), np.inf)
    for sign in (1, -1) if q.zeros is None else (1,):
        for step in np.linspace(0.3, 1.2, 400) * np.abs(groups).max() / (8 if q.zeros is not None else -low):
            values = np.clip(np.round(groups / (sign * step)), low - zero, high - zero) * sign * step
            best = np.minimum(best, np.square(values - groups).sum(1))
    assert found.sum() < 1.02 * best.sum()


def test_silent_channels_count_a_little() -> None:
    """A block whose channels the calibration text never moved is still quantized with care, and moments that are all zero say nothing."""
    x = torch.from_numpy(normal(8, 64))
    silent = torch.ones(64)
    silent[32:] = 0
    for mean_square in (silent, torch.zeros(64)):
        q = quantize(x, INT4, "mse", mean_square)
        assert torch.equal(q.codes, quantize(x, INT4).codes)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (torch.full((64,), np.nan), "NaN, infinite or negative"),
        (torch.full((64,), -1.0), "NaN, infinite or negative"),
        (torch.ones(32), r"moments of \[32\] input channels do not belong to a weight with 64"),
    ],
)
def test_bad_moments_are_refused(moments: torch.Tensor, message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        quantize(torch.from_numpy(normal(4, 64)), INT4, "mse", moments)


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
    for method in ("mse", "rtn"):
        assert torch.equal(quantize(torch.from_numpy(x), scheme, method).dequantize(), torch.zeros(1, 32))


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
    assert scaled is not None
    assert torch.equal(scaled.codes, q.codes)
    assert torch.equal(scaled.dequantize(), q.dequantize() * factor)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20, 1 / 3])
def test_scaling_that_would_round_is_refused(factor: float) -> None:
    assert run(normal(4, 64), INT4).scaled(factor) is None


@pytest.mark.parametrize(
    "name", ["int4-block32", "int4-block128", "int5-block32", "int8-block32", "int4-asym-block32", "gguf-q4_k", "gguf-q6_k", "gguf-iq4_nl"]
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_quick_search_is_hardly_worse(name: str, weighted: bool) -> None:
    scheme, x = find_scheme(name), torch.from_numpy(normal(32, 256) ** 3)  # tails heavier than those of weights
    energy = torch.linspace(0.5, 2, 256) if weighted else torch.ones(256)

    def error(method: Rounding) -> float:
        rounded = quantize(x, scheme, method, energy if weighted else None).dequantize()
        return float(((rounded - x).square() @ energy).sum())

    assert error("quick") <= 1.1 * error("mse")
