"""AWQ's search: it helps where a few channels are loud, never hurts by its own measure, and respects shared scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.awq import awq_scale
from calibration.gptq import output_error
from calibration.statistics import Moments
from elmexport.errors import ElmExportError
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import CodedScheme, find_scheme


def moments(loud: float, hessian: bool = True) -> Moments:
    x = torch.randn(400, 128, generator=torch.Generator().manual_seed(0))
    x[:, ::16] *= loud
    return Moments(400, x.square().mean(0), x.abs().mean(0), x.T @ x / 400 if hessian else None)


WEIGHT = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))


def scheme(name: str) -> CodedScheme:
    found = find_scheme(name)
    assert isinstance(found, CodedScheme)
    return found


def loss(scale: Tensor, kind: CodedScheme, hessian: Tensor) -> float:
    return output_error(WEIGHT - quantize(WEIGHT * scale, kind).dequantize() / scale, hessian)


@pytest.mark.parametrize(
    ("name", "limit"),
    # Where all columns share one scale or table, a finer one for the loud columns costs the others more.
    [("int4-block32", 0.6), ("int4-asym-block32", 0.6), ("int4-channel", 0.9), ("lut4-group8", 0.95)],
)
@pytest.mark.parametrize("hessian", [True, False])
def test_loud_channels_are_rounded_more_finely(name: str, limit: float, hessian: bool) -> None:
    scale = awq_scale(WEIGHT, scheme(name), moments(30.0, hessian))
    assert scale is not None and scale.shape == (128,)
    assert scale[::16].min() > scale[1::16].max()
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-4)
    full = moments(30.0).hessian
    assert full is not None
    assert loss(scale, scheme(name), full) < limit * loss(torch.ones(128), scheme(name), full)


def test_columns_that_share_a_scale() -> None:
    shared = torch.arange(64).repeat(2)
    scale = awq_scale(WEIGHT, scheme("int4-block32"), moments(30.0), shared)
    assert scale is not None and scale.shape == (64,)
    assert scale[::16].min() > scale[1::16].max()


def test_silent_inputs() -> None:
    zero = Moments(1, torch.zeros(128), torch.zeros(128), torch.zeros(128, 128))
    assert awq_scale(WEIGHT, scheme("int4-block32"), zero) is None
    some = moments(30.0)
    some.mean_square[3] = 0
    scale = awq_scale(WEIGHT, scheme("int4-block32"), some)
    assert scale is not None and torch.isfinite(scale).all() and (scale > 0).all()


def test_a_shape_that_does_not_fit() -> None:
    with pytest.raises(ElmExportError, match="rows of 128 values do not divide into blocks of 48"):
        awq_scale(WEIGHT, scheme("int4-block48"), moments(1.0))
