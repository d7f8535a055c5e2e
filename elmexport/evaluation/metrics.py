"""How far two next-token distributions are apart, per token, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities `[tokens, vocab]` of `logits`, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class Divergence:
    """The distance of an artifact's distributions from the reference's over `tokens` positions."""

    tokens: int
    kl_mean: float  # nats per token, KL(reference || artifact)
    kl_max: float
    top1_agreement: float  # share of positions whose most likely token is the same


def divergence(reference: NDArray[np.floating], candidate: NDArray[np.floating]) -> Divergence:
    """Compare logits `[tokens, vocab]`. A candidate with NaN or infinite logits is infinitely far away."""
    if not np.isfinite(candidate).all():
        return Divergence(len(reference), float("inf"), float("inf"), 0.0)
    p, q = log_softmax(reference), log_softmax(candidate)
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)  # rounding can make a divergence of zero slightly negative
    agreement = (p.argmax(axis=-1) == q.argmax(axis=-1)).mean()
    return Divergence(len(reference), float(kl.mean()), float(kl.max()), float(agreement))
