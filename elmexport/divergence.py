"""KL divergence and negative log-likelihood of next-token logits, per token, in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmexport.cores import available_cores

Logits = NDArray[np.floating]

ROWS = 8  # tokens worked on at once: 8 × 32,000 float64 values stay in the cache, which makes it several times faster


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Compute log-probabilities `[tokens, vocab]` of `logits`, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_nll(logits: Logits, targets: NDArray[np.integer]) -> NDArray[np.float64]:
    """Compute the negative log-likelihood in nats of `targets` `[tokens]` under `logits` `[tokens, vocab]`."""

    def some(rows: slice) -> NDArray[np.float64]:
        return -np.take_along_axis(log_softmax(logits[rows]), targets[rows, None], axis=-1)[:, 0]

    return _by_rows(some, len(logits))


def token_divergence(reference: Logits, candidate: Logits) -> NDArray[np.float64]:
    """Compute KL(reference || candidate) in nats, per token, of logits or log-probabilities `[tokens, vocab]`.

    Infinite where `candidate` is not finite.
    """

    def some(rows: slice) -> NDArray[np.float64]:
        finite = np.asarray(np.isfinite(candidate[rows]).all(axis=-1, keepdims=True))
        p, q = log_softmax(reference[rows]), log_softmax(np.where(finite, candidate[rows], 0))
        kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)  # rounding can make a divergence of zero slightly negative
        return np.where(finite[:, 0], kl, np.inf)

    return _by_rows(some, len(reference))


def _by_rows(function: Callable[[slice], NDArray[np.float64]], count: int) -> NDArray[np.float64]:
    parts = [slice(start, start + ROWS) for start in range(0, count, ROWS)]
    with ThreadPoolExecutor(available_cores()) as threads:  # numpy lets go of the interpreter lock
        return np.concatenate(list(threads.map(function, parts)))


@dataclass(frozen=True)
class Divergence:
    """The distance of an artifact's distributions from the reference's over `tokens` positions."""

    tokens: int
    kl_mean: float  # nats per token, KL(reference || artifact)
    kl_max: float
    top1_agreement: float  # share of positions whose most likely token is the same


def divergence(reference: Logits, candidate: Logits) -> Divergence:
    """Compare logits `[tokens, vocab]`. A candidate with NaN or infinite logits is infinitely far away."""
    if not np.isfinite(candidate).all():
        return Divergence(len(reference), float("inf"), float("inf"), 0.0)
    kl = token_divergence(reference, candidate)
    agreement = (reference.argmax(axis=-1) == candidate.argmax(axis=-1)).mean()
    return Divergence(len(reference), float(kl.mean()), float(kl.max()), float(agreement))
