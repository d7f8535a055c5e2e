"""GPTQ on inputs with known correlations, and on `tiny`: the output error is what it lowers, against the plainer methods and a brute-force optimum."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from calibration.gptq import gptq, output_error
from elmexport.errors import ElmExportError
from elmexport.quantization.codec import Quantized
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.lut_codec import PalettizedTensor
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import CodedScheme, find_scheme

NAMES = (
    "int3-block32",
    "int5-block32",
    "int6-channel",
    "int4-block32",
    "int4-block64",
    "int4-channel",
    "int8-block32",
    "int4-asym-block32",
    "lut4-group8",
    "lut4-tensor",
)


def problem(rows: int = 48, columns: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(4 * columns, columns // 4, generator=generator) @ torch.randn(columns // 4, columns, generator=generator)
    x += torch.randn(x.shape, generator=generator)
    x[:, ::17] *= 5
    return weight, x.T @ x / len(x)


def scheme(name: str) -> CodedScheme:
    found = find_scheme(name)
    assert isinstance(found, CodedScheme)
    return found


def loss(weight: Tensor, quantized: Quantized, hessian: Tensor) -> float:
    return output_error(weight - quantized.dequantize(), hessian)


def assert_well_formed(q: Quantized, like: Quantized) -> None:
    """Shapes, dtypes and ranges as `quantize` gives them."""
    assert q.scheme == like.scheme
    assert q.codes.shape == like.codes.shape and q.codes.dtype == like.codes.dtype and q.codes.is_contiguous()
    if isinstance(q, PalettizedTensor) or isinstance(like, PalettizedTensor):
        assert isinstance(q, PalettizedTensor) and isinstance(like, PalettizedTensor)
        assert q.tables.shape == like.tables.shape and q.tables.dtype == torch.float16
        assert (q.tables.diff(dim=1) >= 0).all() and int(q.codes.max()) < q.scheme.entries
        return
    assert q.scales.shape == like.scales.shape and q.scales.dtype == torch.float16 and torch.isfinite(q.scales).all()
    low, high = q.scheme.range
    assert low <= int(q.codes.min()) and int(q.codes.max()) <= high
    assert (q.zeros is None) == (like.zeros is None)


@pytest.mark.parametrize("name", NAMES)
def test_each_step_lowers_the_output_error(name: str) -> None:
    weight, hessian = problem()
    plain = quantize(weight, scheme(name))
    weighted = quantize(weight, scheme(name), "mse", hessian.diagonal())
    greedy = gptq(weight, scheme(name), hessian, rounds=0)
    refitted = gptq(weight, scheme(name), hessian, rounds=2)
    assert_well_formed(refitted, plain)
    losses = [loss(weight, q, hessian) for q in (plain, weighted, greedy, refitted)]
    if name != "int8-block32":  # whose scales are not searched
        assert losses[1] < 0.99 * losses[0]
    assert losses[2] < 0.7 * losses[1]
    assert losses[3] < 0.97 * losses[2]


def test_the_error_is_near_the_best_that_any_codes_give() -> None:
    """Four columns, one scale per row, all 16^4 codes tried at that scale."""
    weight, hessian = problem(12, 4)
    q = gptq(weight, scheme("int4-channel"), hessian, damping=1e-6, rounds=4)
    assert isinstance(q, IntegerTensor)
    codes = torch.tensor(list(product(range(-8, 8), repeat=4)), dtype=torch.float32)
    best = 0.0
    for row, scale in zip(weight, q.scales.to(torch.float32), strict=True):
        error = row - codes * scale
        best += float(((error @ hessian) * error).sum(1).min())
    assert loss(weight, q, hessian) < 1.1 * best


def test_uncorrelated_inputs_leave_nothing_to_pass_on() -> None:
    """With a diagonal Hessian, GPTQ is rounding to nearest at the scales it starts from."""
    weight, _ = problem()
    diagonal = torch.rand(128) + 0.5
    found = gptq(weight, scheme("int4-block32"), diagonal.diag(), damping=0.0, rounds=0)
    expected = quantize(weight, scheme("int4-block32"), "mse", diagonal)
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("name", NAMES)
def test_dead_channels_are_rounded_to_nearest(name: str) -> None:
    """Channels that the calibration text never moved keep sensible weights: another text may need them."""
    weight, hessian = problem()
    dead = torch.tensor([0, 5, 40, 127])
    hessian[dead], hessian[:, dead] = 0, 0
    q = gptq(weight, scheme(name), hessian)
    relative = (q.dequantize() - weight)[:, dead].square().mean() / weight[:, dead].square().mean()
    assert relative < (0.06 if name == "int3-block32" else 0.03)
    assert loss(weight, q, hessian) < 0.7 * loss(weight, quantize(weight, scheme(name), "mse", hessian.diagonal()), hessian)


def test_a_hessian_of_zeros_says_nothing() -> None:
    weight, _ = problem()
    q = gptq(weight, scheme("int4-block32"), torch.zeros(128, 128))
    plain = quantize(weight, scheme("int4-block32"))
    assert (q.dequantize() - weight).square().sum() <= 1.001 * (plain.dequantize() - weight).square().sum()


def test_fewer_tokens_than_channels() -> None:
    """A singular Hessian."""
    weight, _ = problem()
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(2))
    hessian = x.T @ x / 9
    q = gptq(weight, scheme("int4-block32"), hessian)
    assert loss(weight, q, hessian) < 0.3 * loss(weight, quantize(weight, scheme("int4-block32")), hessian)


def test_rounding_errors_that_make_a_hessian_indefinite_are_damped_away() -> None:
    weight, hessian = problem()
    mean = float(hessian.diagonal().mean())
    hessian += mean * 0.05 * torch.diag(torch.tensor([-1.0, 1.0]).repeat(64)) - torch.eye(128) * float(torch.linalg.eigvalsh(hessian)[0])
    assert torch.linalg.eigvalsh(hessian)[0] < -0.01 * mean
    raised: list[float] = []
    q = gptq(weight, scheme("int4-block32"), hessian, damping=0.01, damped=raised.append)
    assert raised and raised[0] in (0.1, 1.0)
    assert torch.isfinite(q.dequantize()).all()
    assert (q.dequantize() - weight).square().mean() < 0.05
    gptq(weight, scheme("int4-block32"), problem()[1], damped=lambda value: pytest.fail(f"raised to {value}"))


def test_a_matrix_that_is_no_hessian_is_refused() -> None:
    weight, hessian = problem()
    with pytest.raises(ElmExportError, match="not positive definite, even with 10 of its mean diagonal added"):
        gptq(weight, scheme("int4-block32"), torch.eye(128) - torch.ones(128, 128) * 20 + torch.eye(128) * 20, damping=0.01)
    for bad, message in (
        (hessian[:64, :64], r"shape \[64, 64\] does not belong to a weight with 128 input channels"),
        (hessian.index_fill(0, torch.tensor([3]), torch.nan), "128 of the Hessian's values are NaN or infinite"),
        (-hessian, "negative values on its diagonal"),
    ):
        with pytest.raises(ElmExportError, match=message):
            gptq(weight, scheme("int4-block32"), bad)


@pytest.mark.parametrize("name", ["int4-block32", "int4-asym-block32", "lut4-group1"])
def test_blocks_of_zeros_and_one_row(name: str) -> None:
    weight, hessian = problem(1)
    weight[0, 32:64] = 0
    q = gptq(weight, scheme(name), hessian)
    assert_well_formed(q, quantize(weight, scheme(name)))
    if isinstance(q, IntegerTensor):
        assert torch.all(q.dequantize()[0, 32:64] == 0)
    zeros = gptq(torch.zeros(1, 128), scheme(name), hessian)
    assert torch.all(zeros.dequantize() == 0)


def test_scales_that_fp16_cannot_hold() -> None:
    weight, hessian = problem()
    tiny = gptq(weight * 1e-9, scheme("int4-block32"), hessian)
    assert torch.all(tiny.dequantize() == 0)
    small = gptq(weight * 1e-6, scheme("int4-block32"), hessian)  # subnormal scales: few bits, still finite
    assert torch.isfinite(small.dequantize()).all()
    large = weight.clone()
    large[0, 0] = 1e7
    with pytest.raises(ElmExportError, match="exceeds fp16's 65504"):
        gptq(large, scheme("int4-block32"), hessian)
    near = weight * (65504 * 7 / float(weight.abs().max()))  # a fit that would raise a scale beyond the end keeps it
    assert torch.isfinite(gptq(near, scheme("int4-block32"), hessian).dequantize()).all()


def test_shapes_that_do_not_fit() -> None:
    weight, hessian = problem(12, 100)
    with pytest.raises(ElmExportError, match="rows of 100 values do not divide into blocks of 32"):
        gptq(weight, scheme("int4-block32"), hessian)
    with pytest.raises(ElmExportError, match="12 output channels do not divide into groups of 8"):
        gptq(weight, scheme("lut4-group8"), hessian)


def test_half_precision_weights_are_read_exactly() -> None:
    weight, hessian = problem()
    found, expected = (gptq(w, scheme("int4-block32"), hessian) for w in (weight.bfloat16(), weight.bfloat16().float()))
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
