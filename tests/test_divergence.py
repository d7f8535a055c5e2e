"""Divergence of two sets of logits, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from elmexport.divergence import Divergence, divergence, log_softmax
from tests import reference

LOGITS = arrays(np.float32, (6, 9), elements=st.floats(-60, 60, width=32))


@given(logits=LOGITS)
@settings(deadline=None)
def test_log_softmax_equals_scipy(logits: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(log_softmax(logits), scipy.special.log_softmax(logits.astype(np.float64), axis=-1), atol=1e-12)


@given(p=LOGITS, q=LOGITS)
@settings(deadline=None)
def test_kl_equals_scipy(p: NDArray[np.float32], q: NDArray[np.float32]) -> None:
    expected = scipy.stats.entropy(
        scipy.special.softmax(p.astype(np.float64), -1), scipy.special.softmax(q.astype(np.float64), -1), axis=-1
    )
    found = divergence(p, q)
    assert found.tokens == 6
    assert found.kl_mean == pytest.approx(expected.mean(), rel=1e-9, abs=1e-12)
    assert found.kl_max == pytest.approx(expected.max(), rel=1e-9, abs=1e-12)
    # The suite's own reference formula is held to the same measure.
    np.testing.assert_allclose(np.maximum(reference.kl(p, q), 0), np.maximum(expected, 0), rtol=1e-9, atol=1e-12)


def test_the_reference_comes_first() -> None:
    """KL is not symmetric: what the reference finds likely and the candidate does not is what counts."""
    sharp, flat = np.array([[9.0, 0.0, 0.0]]), np.zeros((1, 3))
    assert divergence(sharp, flat).kl_mean == pytest.approx(np.log(3), rel=0.01)
    assert divergence(flat, sharp).kl_mean > 4


def test_equal_up_to_a_constant_is_equal() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    found = divergence(logits, logits + np.float32(4))
    assert found.kl_max < 1e-12 and found.top1_agreement == 1


def test_top1_agreement_counts_positions() -> None:
    reference_logits = np.eye(4)
    candidate = np.eye(4)[[0, 1, 3, 2]]
    assert divergence(reference_logits, candidate).top1_agreement == 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_infinitely_far(value: float) -> None:
    candidate = np.zeros((3, 4), dtype=np.float32)
    candidate[1, 2] = value
    assert divergence(np.zeros((3, 4)), candidate) == Divergence(3, float("inf"), float("inf"), 0.0)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[3e4, -3e4, 0.0]], dtype=np.float32)
    assert divergence(logits, logits).kl_mean == 0
