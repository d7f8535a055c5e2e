"""Look-up tables, against the exact one-dimensional k-means that coremltools ships."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools._deps import _kmeans1d
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.quantization.kmeans import _sorted_sums, cluster
from elmexport.quantization.lut_codec import PalettizedTensor
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import Lut, find_scheme

Array = NDArray[np.float32]


def draw(kind: str, size: tuple[int, int]) -> Array:
    generator = np.random.default_rng(0)
    if kind == "heavy tails":
        return generator.standard_t(3, size).astype(np.float32)
    if kind == "two hills":
        return (generator.standard_normal(size) + np.where(generator.random(size) < 0.2, 8, 0)).astype(np.float32)
    return generator.standard_normal(size).astype(np.float32)


def squared_error(values: Array, codes: torch.Tensor, tables: torch.Tensor, weights: Array) -> float:
    found = tables.to(torch.float64).gather(1, codes.to(torch.int64)).numpy()
    return float((weights * np.square(found - values)).sum())


def exact_error(values: Array, entries: int, weights: Array | None) -> float:
    total = 0.0
    for row in values:
        result = _kmeans1d.cluster(row.tolist(), entries, weights=None if weights is None else weights.tolist())
        error = np.square(np.array(result.centroids)[np.array(result.clusters)] - row)
        total += float((error if weights is None else error * weights).sum())
    return total


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "two hills"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("entries", "limit"), [(16, 1.005), (64, 1.01)])
def test_squared_error_against_the_optimum(kind: str, weighted: bool, entries: int, limit: float) -> None:
    values = draw(kind, (4, 8 * 256))
    importance = np.random.default_rng(1).lognormal(size=256).astype(np.float32) if weighted else None
    codes, tables = cluster(torch.from_numpy(values), entries, None if importance is None else torch.from_numpy(importance))
    weights = None if importance is None else np.tile(importance, 8)
    found = squared_error(values, codes, tables, np.ones(2048, np.float32) if weights is None else weights)
    assert found < limit * exact_error(values, entries, weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lut4-group8", "lut4-group1", "lut6-group16", "lut8-tensor", "lut4-tensor"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_definition(name: str, weighted: bool) -> None:
    """Shapes; ascending tables; each code that of the entry nearest to its value; `dequantize` looks up."""
    x = torch.from_numpy(draw("normal", (32, 96)))
    scheme = find_scheme(name)
    assert isinstance(scheme, Lut)
    q = quantize(x, scheme, "mse", torch.rand(96) + 0.1 if weighted else None)
    groups = scheme.granularity.count((32, 96))
    assert q.codes.shape == x.shape and q.codes.dtype == torch.uint8
    assert q.tables.shape == (groups, scheme.entries) and q.tables.dtype == torch.float16
    tables = q.tables.numpy().astype(np.float64)
    assert np.all(np.diff(tables, axis=1) >= 0)
    rows = np.repeat(tables, 32 // groups, axis=0)
    values = np.take_along_axis(rows, q.codes.numpy().astype(int), axis=1)
    np.testing.assert_array_equal(q.dequantize().numpy(), values)
    nearest = np.abs(rows[:, None, :] - x.numpy()[:, :, None]).min(2)
    np.testing.assert_allclose(np.abs(values - x.numpy()), nearest, rtol=0, atol=1e-6)


def test_few_distinct_values_are_kept_exactly() -> None:
    x = torch.tensor([-1.5, 0.0, 0.25, 3.0]).repeat(8, 32)
    assert torch.equal(quantize(x, find_scheme("lut4-group8")).dequantize(), x)
    assert torch.equal(quantize(torch.zeros(8, 32), find_scheme("lut4-group8")).dequantize(), torch.zeros(8, 32))


def test_one_row_with_fewer_values_than_entries() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5]])
    assert torch.equal(quantize(x, find_scheme("lut8-group1")).dequantize(), x)


def test_an_outlier_gets_an_entry_of_its_own() -> None:
    x = torch.from_numpy(draw("normal", (8, 512)))
    x[3, 7] = 1000.0
    assert quantize(x, find_scheme("lut4-group8")).dequantize()[3, 7] == 1000.0


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_long_groups_are_merged_without_loss(weighted: bool) -> None:
    """Beyond 2^17 values, those that agree in their leading bits are one point: fewer points, the same sums."""
    x = draw("normal", (1, 1 << 18))
    weights = np.random.default_rng(1).random(1 << 18, dtype=np.float32) if weighted else None
    points, mass, moment = _sorted_sums(x, weights)
    assert points.shape[1] < x.size // 4
    w = np.ones(x.size) if weights is None else weights.astype(np.float64)
    assert mass[0, -1] == pytest.approx(w.sum(), rel=1e-9)
    assert moment[0, -1] == pytest.approx((w * x[0]).sum(), rel=1e-4, abs=1e-3)
    codes, tables = cluster(torch.from_numpy(x), 16)
    # The error of the best 16-entry table for normal values, per value: Max, "Quantizing for minimum distortion", 1960.
    assert squared_error(x, codes, tables, np.ones(x.size, np.float32)) / x.size == pytest.approx(0.009497, rel=0.02)


def test_refusals() -> None:
    x = torch.zeros(12, 32)
    with pytest.raises(ElmExportError, match="12 output channels do not divide into groups of 8"):
        quantize(x, find_scheme("lut4-group8"))
    with pytest.raises(ElmExportError, match=r"method 'rtn' does not exist for 4-bit indices.*choose 'mse'"):
        quantize(x, find_scheme("lut4-group4"), "rtn")
    x[0, 0] = 7e4
    with pytest.raises(ElmExportError, match="needs a table entry that exceeds fp16's 65504"):
        quantize(x, find_scheme("lut4-group4"))


def test_scaled_is_exact_or_none() -> None:
    q = quantize(torch.from_numpy(draw("normal", (8, 64))), find_scheme("lut4-group8"))
    assert isinstance(q, PalettizedTensor)
    quarter = q.scaled(0.25)
    assert quarter is not None
    assert torch.equal(quarter.dequantize(), q.dequantize() / 4)
    assert q.scaled(2.0**-20) is None
