"""Regularization by held-out error: the prediction against errors of codes that GPTQ really found, and fits that would not hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.gptq import gptq
from calibration.held_out import PARTS, Half, choose_damping, fit
from elmexport.quantization.schemes import CodedScheme, find_scheme

WIDTH, OUT = 96, 64


def moments(tokens: int, seed: int, *, massive: float = 1.0) -> Tensor:
    """Second moments of correlated inputs, of which one channel may be `massive` times as large."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(WIDTH, WIDTH)) * np.exp(-np.arange(WIDTH) / 12)
    x = generator.normal(size=(tokens, WIDTH)) @ mix.T + 0.05 * generator.normal(size=(tokens, WIDTH))
    x[:, 7] *= massive
    return torch.from_numpy(x.T @ x / tokens).float()


def measured(first: Tensor, second: Tensor, damping: float) -> float:
    """Error under `second`, in float64, of codes that GPTQ finds under `first`."""
    scheme = find_scheme("int4-block32")
    assert isinstance(scheme, CodedScheme)
    weight = torch.from_numpy(np.random.default_rng(5).normal(size=(OUT, WIDTH))).float()
    error = (gptq(weight, scheme, first, damping=damping, rounds=0).dequantize() - weight).double().numpy()
    return float(np.einsum("oi,ij,oj->", error, second.double().numpy(), error))


@pytest.mark.parametrize(("tokens", "massive"), [(60, 1.0), (150, 1.0), (4000, 1.0), (150, 100.0)])
def test_the_damping_chosen_is_nearly_the_best(tokens: int, massive: float) -> None:
    first, second = moments(tokens, 1, massive=massive), moments(20000, 2, massive=massive)
    costs = {part: measured(first, second, part) for part in PARTS}
    for start in (PARTS[0], PARTS[-1]):
        chosen = choose_damping(first, second, start)
        assert costs[chosen] < 1.1 * min(costs.values())
    assert max(costs.values()) > 1.2 * min(costs.values())  # there was something to choose


def test_more_text_takes_less_damping() -> None:
    second = moments(20000, 2)
    assert choose_damping(moments(4000, 1), second) < choose_damping(moments(12, 1), second)


def halves(*, signal: float, tokens: int = 200) -> list[Half]:
    """Both halves of a regression of 8 outputs on 32 inputs."""
    generator = np.random.default_rng(3)
    truth = signal * generator.normal(size=(8, 32))
    found = []
    for _ in range(2):
        x = generator.normal(size=(tokens, 32))
        y = x @ truth.T + generator.normal(size=(tokens, 8))
        found.append(Half(torch.from_numpy(x.T @ x / tokens).float(), torch.from_numpy(y.T @ x / tokens).float()))
    return found


def test_a_fit_is_the_ridge_regression_that_the_other_half_likes_best() -> None:
    given = halves(signal=0.3)
    found, part = fit(given)
    assert found is not None
    h, m = ((getattr(given[0], name) + getattr(given[1], name)).double().numpy() / 2 for name in ("hessian", "missing"))
    np.testing.assert_allclose(found.numpy(), m @ np.linalg.inv(h + part * np.trace(h) / 32 * np.eye(32)), atol=1e-5)
    for start in (PARTS[0], PARTS[-1]):
        assert fit(given, start)[1] == part


def test_noise_is_left_alone() -> None:
    assert fit(halves(signal=0.0))[0] is None


def test_one_half_alone_is_fitted_with_the_default() -> None:
    found, _ = fit(halves(signal=0.3)[:1])
    assert found is not None and torch.isfinite(found).all()
