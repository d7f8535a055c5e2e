"""MXFP4: elements and exponents against mlx's own quantizer and against a search in float64; the grid that GPTQ rounds to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calibration.gptq import gptq, output_error
from elmexport.errors import ElmExportError
from elmexport.quantization.mxfp4 import Mxfp4
from elmexport.quantization.mxfp4_codec import MAGNITUDES, Mxfp4Tensor, elements, nearest
from elmexport.quantization.quantize import quantize

SCHEME = Mxfp4()


def matrix(seed: int = 0) -> NDArray[np.float32]:
    """Rows of very different sizes, one of zeros."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((64, 128), dtype=np.float32) * np.exp(3 * generator.standard_normal((64, 1), dtype=np.float32))
    weight[3] = 0
    return weight


def quantized(weight: NDArray[np.float32], method: str = "rtn") -> Mxfp4Tensor:
    found = quantize(torch.from_numpy(weight), SCHEME, method)  # type: ignore[arg-type]
    assert isinstance(found, Mxfp4Tensor)
    return found


def test_mlx_quantizes_alike() -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")
    weight = matrix()
    codes, exponents = mx.quantize(mx.array(weight), mode="mxfp4")
    found = quantized(weight)
    assert np.array_equal(found.exponent_bytes().numpy(), np.array(exponents))
    assert np.array_equal(found.parts()["codes"].numpy(), np.array(codes).view(np.uint8))
    read = mx.dequantize(codes, exponents, mode="mxfp4", dtype=mx.float32)
    assert np.array_equal(found.dequantize().numpy(), np.array(read))


def test_nearest_and_ties() -> None:
    values = torch.tensor([0.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -5.1, -0.2, 0.26])
    assert elements(nearest(values)).tolist() == [0, 0, 0, 1, 1, 2, 2, 4, 4, 6, -6, 0, 0.5]
    dense = torch.linspace(-7, 7, 2001, dtype=torch.float64)
    grid = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.float64)
    least = (dense[:, None] - grid).abs().amin(1)
    assert torch.allclose((elements(nearest(dense.float())).double() - dense).abs(), least, atol=1e-6)


def test_mse_is_the_best_of_all_exponents_near() -> None:
    weight = matrix(1)
    found = quantized(weight, "mse")
    errors = ((found.dequantize().double().numpy() - weight) ** 2).reshape(64, 4, 32).sum(-1)
    grid = np.array([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    start = np.ceil(np.log2(np.maximum(np.abs(weight.reshape(64, 4, 32)).max(-1), 1e-30).astype(np.float64) / 6))
    all_errors = []
    for offset in (-2, -1, 0, 1, 2):
        scale = 2.0 ** (start + offset)[..., None]
        x = weight.reshape(64, 4, 32) / scale
        all_errors.append(((grid[np.abs(x[..., None] - grid).argmin(-1)] * scale - weight.reshape(64, 4, 32)) ** 2).sum(-1))
    assert errors == pytest.approx(np.min(all_errors, 0), rel=1e-5)
    assert errors.sum() < ((quantized(weight).dequantize().numpy() - weight) ** 2).sum()


def test_scaled_by_powers_of_two_exactly() -> None:
    found = quantized(matrix())
    for factor in (2.0**-9, 0.5, 4.0):
        scaled = found.scaled(factor)
        assert scaled is not None and torch.equal(scaled.dequantize(), found.dequantize() * factor)
    assert found.scaled(2.0**-200) is None


def test_gptq_rounds_to_it() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator)
    x = torch.randn(512, 64, generator=generator) @ mix
    hessian = x.T @ x / len(x)
    weight = torch.randn(48, 64, generator=generator)
    plain = quantize(weight, SCHEME)
    better = gptq(weight, SCHEME, hessian)
    assert isinstance(better, Mxfp4Tensor) and better.codes.max() < 16
    assert output_error(weight - better.dequantize(), hessian) < 0.6 * output_error(weight - plain.dequantize(), hessian)
    grid = plain.grid()
    assert torch.equal(grid.result().dequantize(), plain.dequantize())


def test_refusals() -> None:
    with pytest.raises(ElmExportError, match="rows of 33 values do not divide into blocks of 32"):
        quantize(torch.zeros(2, 33), SCHEME)
    with pytest.raises(ElmExportError, match="unknown method 'nearest'; known: mse, rtn"):
        quantize(torch.zeros(2, 32), SCHEME, "nearest")  # type: ignore[arg-type]
