"""RMSNorm at the ends of fp16, computed by coremltools: given constants, its builder evaluates every op in numpy's fp16."""

from __future__ import annotations

import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function
from numpy.typing import NDArray

from targets.coreml.norm import rms_norm


def evaluate(x: NDArray[np.float64], eps: float) -> NDArray[np.float16]:
    """The norm of `x` `[channels, tokens]` over channels, with weights of 1."""
    weight = np.ones((1, len(x), 1, 1), np.float16)
    with np.errstate(all="raise", under="ignore"), Function({"unused": mb.placeholder((1,))}):
        result = rms_norm(mb.const(val=x.astype(np.float16)[None, :, None]), weight, eps, axis=1).val
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float16
    return result[0, :, 0]


def exact(x: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    wide = x.astype(np.float16).astype(np.float64)
    return wide / np.sqrt((wide**2).mean(0) + eps)


@pytest.mark.parametrize("alpha", [1.0, 2.0**-5, 2.0**-10])
@pytest.mark.parametrize("magnitude", [16000.0, 300.0, 1.0, 1e-2, 1e-3])
def test_any_magnitude(magnitude: float, alpha: float) -> None:
    # The stream after rescaling: what fp16 keeps of it is taken as given. The largest lies far beyond fp16's square root.
    x = np.random.default_rng(0).standard_normal((1280, 3)) * magnitude * min(1.0, alpha * 32)
    assert np.abs(evaluate(x, 1e-6 * alpha**2) - exact(x, 1e-6 * alpha**2)).max() < 0.01


@pytest.mark.parametrize("alpha", [1.0, 2.0**-5, 2.0**-15, 2.0**-20])
def test_zeros_give_zeros(alpha: float) -> None:
    # Padded rows of an embedding are often zero; a NaN there would spread through the cache.
    assert not evaluate(np.zeros((192, 2)), 1e-6 * alpha**2).any()


def test_one_channel_rules_all_others() -> None:
    x = np.full((1280, 1), 0.5)
    x[7] = 60000
    assert np.allclose(evaluate(x, 1e-6), exact(x, 1e-6), rtol=5e-3)


@pytest.mark.parametrize("alpha", [1.0, 2.0**-5])
def test_eps_counts_where_the_input_is_small(alpha: float) -> None:
    x = np.random.default_rng(1).standard_normal((256, 2)) * 1e-3 * alpha
    assert np.abs(evaluate(x, 1e-6 * alpha**2) - exact(x, 1e-6 * alpha**2)).max() < 0.01
