"""ggml's block types with codes of this project: against ggml's own quantizer and gguf's own dequantizer, and as grids that GPTQ changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from calibration.gptq import gptq, output_error
from elmexport.errors import ElmExportError
from elmexport.quantization.codec import find_codec
from elmexport.quantization.ggml import GGML_TYPES
from elmexport.quantization.ggml_codec import BlockTensor
from elmexport.quantization.ggml_coded import GGML_CODED, GgmlCoded, coded
from elmexport.quantization.ggml_search import iq4_edges, nearest
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import find_scheme
from targets.gguf import ggml
from targets.gguf.packing import pack

KINDS = pytest.mark.parametrize("kind", GGML_CODED, ids=lambda kind: kind.name)


def weights(rows: int = 64, columns: int = 512, seed: int = 0) -> Tensor:
    """Heavier tails than a normal distribution's, as weights have."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(5, (rows, columns)).astype(np.float32)) * 0.02


def importances(columns: int = 512) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).uniform(size=columns).astype(np.float32)) ** 3 * 5 + 0.05


def their_values(packed: np.ndarray, kind: GgmlCoded) -> np.ndarray:
    return quants.dequantize(packed, GGMLQuantizationType[kind.name])


@KINDS
@pytest.mark.parametrize("shape", [(64, 512), (3, 256), (1, 1024)])
def test_ggufs_dequantizer_gives_our_values(kind: GgmlCoded, shape: tuple[int, int]) -> None:
    q = quantize(weights(*shape), kind)
    packed = pack(q)
    assert packed.shape == (shape[0], shape[1] // kind.block * kind.block_bytes)
    assert np.array_equal(their_values(packed, kind), q.dequantize().numpy())


@KINDS
def test_any_codes_and_whole_numbers_are_packed(kind: GgmlCoded) -> None:
    """Also those that a search seldom finds: every bit of a block is somebody's."""
    q = quantize(weights(8, 512), kind)
    assert isinstance(q, BlockTensor)
    random = np.random.default_rng(2)

    def whole(ends: tuple[int, int] | None, like: Tensor) -> Tensor:
        return like if ends is None else torch.from_numpy(random.integers(ends[0], ends[1] + 1, like.shape, dtype=np.int8))

    low = kind.low or 0
    codes = torch.from_numpy(random.integers(low, low + 2**kind.width, q.codes.shape, dtype=np.int8))
    mixed = BlockTensor(kind, codes, whole(kind.scales, q.scales), whole(kind.minima, q.minima), q.d, q.dmin)
    assert np.array_equal(their_values(pack(mixed), kind), mixed.dequantize().numpy())
    parts = mixed.parts()
    assert torch.equal(find_codec(kind).from_parts(parts, (8, 512)).dequantize(), mixed.dequantize())


@KINDS
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_as_good_as_ggmls_own(kind: GgmlCoded, weighted: bool) -> None:
    """Squared error, weighted where an importance matrix is given; ggml's weights of its own, without one, aim at something else."""
    weight, importance = weights(), importances() if weighted else None
    own = next(one for one in GGML_TYPES if one.name == kind.name)
    theirs = torch.from_numpy(their_values(ggml.quantize(weight, own, None if importance is None else importance.numpy()), kind))
    ours = quantize(weight, kind, "mse", importance).dequantize()
    scale = 1 if importance is None else importance
    errors = [float(((values - weight).square() * scale).sum()) for values in (ours, theirs)]
    assert errors[0] < 1.01 * errors[1]


@KINDS
def test_extreme_weights(kind: GgmlCoded) -> None:
    weight = torch.zeros(6, 256)
    weight[1] = 3.0
    weight[2] = -3.0
    weight[3, 7] = 1e-8  # below the smallest fp16 scale
    weight[4, 200] = 60000.0
    weight[5, ::2] = 1.0
    found = quantize(weight, kind).dequantize()
    assert torch.isfinite(found).all()
    assert not found[0].any()
    torch.testing.assert_close(found[[1, 2, 5]], weight[[1, 2, 5]], rtol=0.25, atol=0.4)
    with pytest.raises(ElmExportError, match="fp16's 65504"):
        quantize(weight * 1e6, kind)


@KINDS
def test_the_grid_is_linear_in_its_parameters(kind: GgmlCoded) -> None:
    """`expand` against `dequantize`, `reduce` as its transpose, `squares` as the diagonal of what least squares solve; in float64."""
    grid = quantize(weights(4, 512), kind).grid()
    assert torch.equal(grid.expand(grid.parameters).t(), grid.result().dequantize())
    count = grid.parameters.shape[0]
    columns = torch.stack([grid.expand(torch.eye(count)[i][:, None].expand(-1, 4).contiguous())[:, 0].double() for i in range(count)])
    matrix = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grid.reduce(matrix)[:, 0].double(), columns @ matrix[:, 0].double(), rtol=1e-4, atol=1e-4)
    diagonal = torch.rand(512) + 0.1
    torch.testing.assert_close(grid.squares(diagonal)[:, 0].double(), columns.square() @ diagonal.double(), rtol=1e-4, atol=1e-4)


@KINDS
def test_gptq_finds_codes_in_it(kind: GgmlCoded) -> None:
    weight = weights(48, 256)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 64, generator=generator) @ torch.randn(64, 256, generator=generator)
    x += torch.randn(x.shape, generator=generator)
    x[:, ::17] *= 5
    hessian = x.T @ x / len(x)
    start = quantize(weight, kind, "mse", hessian.diagonal())
    found = gptq(weight, kind, hessian)
    assert isinstance(found, BlockTensor) and isinstance(start, BlockTensor)
    before, after = (output_error(weight - q.dequantize(), hessian) for q in (start, found))
    assert after < 0.75 * before
    assert np.array_equal(their_values(pack(found), kind), found.dequantize().numpy())


@KINDS
def test_factors_can_be_trained(kind: GgmlCoded) -> None:
    """The gradient by `d` and `dmin` against a change of each, in float64."""
    tensor = quantize(weights(2, 256), kind)
    parameters = tensor.parameters
    assert parameters is not None
    gradient = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    found = tensor.parameter_gradient(gradient)
    assert found.shape == parameters.shape
    doubled = tensor.with_parameters(parameters * 2)
    assert torch.equal(doubled.codes, tensor.codes)
    # Values are linear in the parameters, so the sum of gradient × parameter is that of gradient × value.
    torch.testing.assert_close((found * parameters).sum(1).double(), (gradient * tensor.dequantize()).sum(1).double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(doubled.dequantize(), tensor.dequantize() * 2)


def test_names() -> None:
    for kind in GGML_CODED:
        assert find_scheme(kind.recipe_name) == kind
    assert [coded(kind).recipe_name for kind in GGML_TYPES if kind.name in ("Q4_0", "Q5_0", "Q8_0")] == [
        "int4-block32",
        "int5-block32",
        "int8-block32",
    ]
    q4_k = find_scheme("gguf-q4_k")
    assert q4_k.refuses((4, 128)) == "rows of 128 values do not divide into Q4_K's blocks of 256"
    assert q4_k.instead == find_scheme("int5-block32")  # as llama.cpp takes Q5_0
    q5_k = find_scheme("gguf-q5_k")
    assert q5_k.instead == find_scheme("gguf-q5_1")
    with pytest.raises(ElmExportError, match=r"unknown scheme 'gguf-q9_k'; known: .*gguf-q4_k"):
        find_scheme("gguf-q9_k")
    with pytest.raises(ElmExportError, match="whose scales are searched; choose 'mse'"):
        quantize(weights(), GGML_CODED[0], "rtn")


def test_iq4_codes_are_the_nearest() -> None:
    """Out of a table, as comparing with every level gives them; of two levels equally near, the lower."""
    kind = find_scheme("gguf-iq4_nl")
    assert isinstance(kind, GgmlCoded)
    edges = iq4_edges(torch.device("cpu"))
    ratios = torch.cat(
        (edges, edges.nextafter(torch.tensor(torch.inf)), edges.nextafter(torch.tensor(-torch.inf)), torch.linspace(-300, 300, 999))
    )
    ones = torch.ones(1, 1)
    found = nearest(ratios[None, None].clone(), kind, ones, torch.zeros(1, 1))[0, 0]
    assert torch.equal(found.long(), torch.bucketize(ratios, edges))
