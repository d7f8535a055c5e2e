"""Sampling against distributions computed by hand, and properties that hold for any logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special, stats

from elmexport.errors import ElmExportError
from elmexport.runtimes.sampler import Sampler, Sampling

HALF_TO_SIXTEENTH = np.log([1 / 16, 1 / 2, 1 / 8, 1 / 4, 1 / 16]).astype(np.float32)  # logits of these very probabilities

logits = arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e4, 1e4, width=32))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Sampling(), [0, 1, 0, 0, 0]),
        (Sampling(1.0), [1 / 16, 1 / 2, 1 / 8, 1 / 4, 1 / 16]),
        (Sampling(0.5), [1 / 86, 64 / 86, 4 / 86, 16 / 86, 1 / 86]),  # squares of 1, 8, 2, 4, 1 sixteenths
        (Sampling(1.0, top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_k=2), [0, 2 / 3, 0, 1 / 3, 0]),
        (Sampling(1.0, top_k=4), [1 / 15, 8 / 15, 2 / 15, 4 / 15, 0]),  # of two equally likely, the lower id
        (Sampling(1.0, top_k=1000), [1 / 16, 1 / 2, 1 / 8, 1 / 4, 1 / 16]),
        (Sampling(1.0, top_p=0.4), [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_p=0.7), [0, 2 / 3, 0, 1 / 3, 0]),
        (Sampling(1.0, top_p=0.8), [0, 4 / 7, 1 / 7, 2 / 7, 0]),
        (Sampling(1.0, top_p=1.0), [1 / 16, 1 / 2, 1 / 8, 1 / 4, 1 / 16]),
        (Sampling(1.0, top_k=2, top_p=0.6), [0, 1, 0, 0, 0]),  # the nucleus is of what top-k left: 2/3 is enough
    ],
    ids=str,
)
def test_probabilities_by_hand(settings: Sampling, expected: list[float]) -> None:
    np.testing.assert_allclose(settings.probabilities(HALF_TO_SIXTEENTH), expected, rtol=1e-6)


@pytest.mark.parametrize("settings", [Sampling(1.0, seed=1), Sampling(0.7, top_k=3, seed=2), Sampling(1.3, top_p=0.9, seed=3)], ids=str)
def test_draws_follow_the_probabilities(settings: Sampling) -> None:
    draw = Sampler(settings)
    counts = np.bincount([draw(HALF_TO_SIXTEENTH) for _ in range(4000)], minlength=5)
    expected = settings.probabilities(HALF_TO_SIXTEENTH)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible] * counts.sum()).pvalue > 1e-4


@given(logits, st.floats(0.05, 10))
def test_temperature_alone_is_softmax(logits: np.ndarray, temperature: float) -> None:
    np.testing.assert_allclose(
        Sampling(temperature).probabilities(logits), special.softmax(logits.astype(np.float64) / temperature), atol=1e-12
    )


@given(logits, st.floats(1e-300, 10), st.none() | st.integers(1, 60), st.none() | st.floats(0.01, 1))
def test_always_a_distribution_that_keeps_the_most_likely(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    settings = Sampling(temperature, top_k, top_p, seed=0)
    probabilities = settings.probabilities(logits)
    assert math.isclose(probabilities.sum(), 1, rel_tol=1e-9)
    assert (probabilities >= 0).all()
    assert probabilities[logits.argmax()] == probabilities.max()
    assert np.count_nonzero(probabilities) <= (top_k or len(logits))
    assert probabilities[Sampler(settings)(logits)] > 0


@given(logits, st.floats(0.01, 1))
def test_the_nucleus_is_the_smallest_that_reaches_p(logits: np.ndarray, top_p: float) -> None:
    everything = Sampling(1.0).probabilities(logits)
    kept = np.sort(everything[Sampling(1.0, top_p=top_p).probabilities(logits) > 0])[::-1]
    assert kept.sum() >= top_p - 1e-9
    assert kept[:-1].sum() < top_p + 1e-9


@given(logits)
def test_greedy_takes_the_most_likely(logits: np.ndarray) -> None:
    assert Sampler(Sampling())(logits) == logits.argmax()


def test_the_same_seed_gives_the_same_draws() -> None:
    flat = np.zeros(1000, np.float32)
    first, second, other = ([draw(flat) for _ in range(20)] for draw in (Sampler(Sampling(1.0, seed=s)) for s in (5, 5, 6)))
    assert first == second != other


def test_masked_logits_are_never_drawn() -> None:
    scores = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    np.testing.assert_allclose(Sampling(1.0).probabilities(scores), [0, 0.5, 0, 0.5])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("settings", [Sampling(), Sampling(1.0)], ids=str)
def test_logits_that_are_not_finite(settings: Sampling, bad: float) -> None:
    with pytest.raises(ElmExportError, match="not finite"):
        settings.probabilities(np.array([0, bad, 1], np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; it must be 0 .* or above"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top-k is 0; it must be 1 or above"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p is 0; it must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.1}, "top-p is 1.1; it must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": math.nan}, "top-p is nan"),
        ({"temperature": 1.0, "min_p": -0.1}, "min-p is -0.1; it must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition-penalty is 0; it must be above 0"),
        ({"min_p": 0.5}, "no effect at temperature 0"),
        ({"seed": -1}, "seed is -1; it must be 0 or above"),
        ({"top_k": 5}, "no effect at temperature 0"),
        ({"top_p": 0.5}, "no effect at temperature 0"),
    ],
)
def test_bad_settings(values: dict[str, float], message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        Sampling(**values)


@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.2, 3),
    st.none() | st.integers(1, 60),
    st.none() | st.floats(0.05, 1),
    st.none() | st.floats(0, 1),
    st.floats(0.5, 2),
)
@settings(deadline=None)
def test_is_what_transformers_processors_give(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float
) -> None:
    """In the order in which its `generate` applies them, all at once. Logits are all different: of ties, transformers keeps all."""
    import torch
    from transformers import GenerationConfig, PreTrainedConfig
    from transformers.generation.utils import GenerationMixin

    generator = np.random.default_rng(seed)
    scores = (generator.permutation(50) * 0.3 - 7 + generator.uniform(0, 0.2, 50)).astype(np.float64)
    previous = generator.integers(0, 50, 12)

    class Model(GenerationMixin):  # type: ignore[misc]
        config = PreTrainedConfig()

    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=top_k or 0, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    processors = Model()._get_logits_processor(generation_config=config, input_ids_seq_length=12, device="cpu")
    wanted = torch.softmax(processors(torch.from_numpy(previous)[None], torch.from_numpy(scores)[None])[0], -1).numpy()
    found = Sampling(temperature, top_k, top_p, min_p=min_p, repetition_penalty=penalty).probabilities(scores, previous.tolist())
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
