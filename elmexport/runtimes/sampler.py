"""Sampling of the next token from logits: the most likely one, or drawn at a temperature from the top k or the nucleus p.

What is not here: penalties, min-p, beam search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, in the order in which they act: temperature, then `top_k`, then `top_p` over what `top_k` left.

    Raises:
        ElmExportError: a value out of range, or one that would have no effect.
    """

    temperature: float = 0.0  # 0: always the most likely token; 1: the model's own distribution
    top_k: int | None = None  # draw among this many most likely tokens
    top_p: float | None = None  # draw among the fewest tokens whose probabilities reach this sum (nucleus sampling, arXiv:1904.09751)
    seed: int | None = None  # the same seed gives the same draws; None: different ones each time

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ElmExportError(f"temperature is {self.temperature:g}; it must be 0 (always the most likely token) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ElmExportError(f"top-k is {self.top_k}; it must be 1 or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ElmExportError(f"top-p is {self.top_p:g}; it must be above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise ElmExportError(f"seed is {self.seed}; it must be 0 or above")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ElmExportError(
                "top-k and top-p have no effect at temperature 0, which always takes the most likely token; set a temperature above 0"
            )

    def probabilities(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """The distribution `[vocab]` that a token is drawn from, given logits `[vocab]`. Ties go to the lower id.

        Raises:
            ElmExportError: logits that are NaN or +infinity.
        """
        scores = logits.astype(np.float64)
        best = int(scores.argmax())
        if not math.isfinite(scores[best]):
            raise ElmExportError("the artifact gave logits that are not finite; check it with `elmexport inspect`, then export it again")
        if self.temperature == 0:
            return np.eye(1, len(scores), best)[0]
        with np.errstate(over="ignore"):  # a tiny temperature may send every other score to -infinity, which is right
            weights = np.exp((scores - scores[best]) / self.temperature)
        probabilities = weights / weights.sum()
        order = np.argsort(-scores, kind="stable")[: self.top_k]
        if self.top_p is not None:
            kept = np.cumsum(probabilities[order]) / probabilities[order].sum()
            order = order[: int(np.searchsorted(kept, self.top_p)) + 1]
        result = np.zeros_like(probabilities)
        result[order] = probabilities[order] / probabilities[order].sum()
        return result


class Sampler:
    """Draws tokens one after the other by `settings`."""

    def __init__(self, settings: Sampling) -> None:
        self.settings = settings
        self._generator = np.random.Generator(np.random.PCG64(settings.seed))

    def __call__(self, logits: NDArray[np.floating]) -> int:
        """The next token, given logits `[vocab]`."""
        probabilities = self.settings.probabilities(logits)
        if self.settings.temperature == 0:
            return int(probabilities.argmax())
        return int(self._generator.choice(len(probabilities), p=probabilities))
