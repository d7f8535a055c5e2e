"""Sampling of the next token from logits, with transformers' settings in transformers' order.

What is not here: beam search, mirostat, penalties by count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, in the order in which they act.

    `repetition_penalty`, then `temperature`, `top_k`, `top_p` over what `top_k` left, `min_p`: transformers' order, and its results, but that
    of tokens that are equally likely at the edge of `top_k` it keeps all, and here the lower ids are kept.

    Raises:
        ElmExportError: a value out of range, or one that would have no effect.
    """

    temperature: float = 0.0  # 0: always the most likely token; 1: the model's own distribution
    top_k: int | None = None  # draw among this many most likely tokens
    top_p: float | None = None  # draw among the fewest tokens whose probabilities reach this sum (nucleus sampling, arXiv:1904.09751)
    seed: int | None = None  # the same seed gives the same draws; None: different ones each time
    min_p: float | None = None  # draw among tokens at least this part as likely as the most likely one (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # divides positive logits of tokens that were there before, multiplies negative ones (arXiv:1909.05858)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ElmExportError(f"--temperature is {self.temperature:g}; it must be 0 (always the most likely token) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ElmExportError(f"--top-k is {self.top_k}; it must be 1 or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ElmExportError(f"--top-p is {self.top_p:g}; it must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ElmExportError(f"--min-p is {self.min_p:g}; it must be from 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ElmExportError(f"--repetition-penalty is {self.repetition_penalty:g}; it must be above 0 (1: none)")
        if self.seed is not None and self.seed < 0:
            raise ElmExportError(f"--seed is {self.seed}; it must be 0 or above")
        if self.temperature == 0 and not (self.top_k is self.top_p is self.min_p is None):
            raise ElmExportError(
                "--top-k, --top-p and --min-p have no effect at temperature 0, which always takes the most likely token; set a --temperature above 0"
            )

    def scores(self, logits: NDArray[np.floating], previous: Sequence[int] = ()) -> NDArray[np.float64]:
        """Logits `[vocab]` after the repetition penalty for the tokens `previous`, prompt included.

        Raises:
            ElmExportError: logits that are NaN or +infinity.
        """
        scores = logits.astype(np.float64)
        if self.repetition_penalty != 1 and len(previous):
            seen = np.unique(np.asarray(previous))
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * self.repetition_penalty, scores[seen] / self.repetition_penalty)
        if not math.isfinite(scores.max()):
            raise ElmExportError("the artifact gave logits that are not finite; check it with `elmexport inspect`, then export it again")
        return scores

    def probabilities(self, logits: NDArray[np.floating], previous: Sequence[int] = ()) -> NDArray[np.float64]:
        """The distribution `[vocab]` that a token is drawn from, given logits `[vocab]` and the tokens before it. Ties go to the lower id.

        Raises:
            ElmExportError: logits that are NaN or +infinity.
        """
        scores = self.scores(logits, previous)
        best = int(scores.argmax())
        if self.temperature == 0:
            return np.eye(1, len(scores), best)[0]
        with np.errstate(over="ignore"):  # a tiny temperature may send every other score to -infinity, which is right
            weights = np.exp((scores - scores[best]) / self.temperature)
        if self.top_k is not None or self.top_p is not None:
            order = np.argsort(-scores, kind="stable")[: self.top_k]
            if self.top_p is not None:
                kept = np.cumsum(weights[order]) / weights[order].sum()
                order = order[: int(np.searchsorted(kept, self.top_p)) + 1]
            left = np.zeros_like(weights)
            left[order] = weights[order]
            weights = left
        if self.min_p is not None:
            weights[weights < self.min_p] = 0  # the most likely token's weight is 1
        probabilities: NDArray[np.float64] = weights / weights.sum()
        return probabilities


class Sampler:
    """Draws tokens one after the other by `settings`."""

    def __init__(self, settings: Sampling, *, guesses: bool = False) -> None:
        """`guesses`: for a draft model, whose draws must be independent of those that accept them, of the same seed too."""
        self.settings = settings
        seed = settings.seed if settings.seed is None or not guesses else [settings.seed, 1]
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, logits: NDArray[np.floating], previous: Sequence[int] = ()) -> int:
        """The next token, given logits `[vocab]` and the tokens before it."""
        if self.settings.temperature == 0:
            return int(self.settings.scores(logits, previous).argmax())
        return self.draw(self.settings.probabilities(logits, previous))

    def draw(self, probabilities: NDArray[np.float64]) -> int:
        """A token of the distribution `[vocab]`."""
        return int(self.generator.choice(len(probabilities), p=probabilities))
