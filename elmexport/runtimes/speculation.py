"""Speculative decoding (arXiv:2211.17192): cheap guesses at the next tokens, read by the model in one step.

The output is the model's own. `PromptLookup` guesses what followed the last tokens where they stood before, `DraftModel` asks a smaller model. What is sampled has exactly the
distribution of plain sampling. Greedy output is exactly plain decoding's: engines may round otherwise when they read several tokens at once, so
the first tokens are decoded plainly and then read again together. Guesses are verified where that gives the very same numbers, or, in engines
that round nothing to few bits, nearly the same: tokens about as likely as others are then decoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.sampler import Sampler, Sampling

TRIAL = 8  # tokens that are decoded plainly and then read again at once
_FACTOR = 64  # by which a difference between the two best logits must exceed the largest one that the trial found
_TRUSTED = 2e-3  # nats; where more would be needed, too many tokens would be decoded again


@dataclass
class Speculation:
    """Counts of speculative decoding of one text."""

    drafted: int = 0
    accepted: int = 0
    steps: int = 0  # that read guesses
    repeated: int = 0  # tokens decoded a second time because two were about equally likely
    note: str | None = None  # why it was given up

    @property
    def mean_accepted(self) -> float:
        """Guesses accepted in a step, on average."""
        return self.accepted / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Draft:
    """Guessed tokens, and the distribution `[vocab]` that each was drawn from; None: it was certain."""

    tokens: list[int]
    probabilities: list[NDArray[np.float64]] | None = None


class Drafter(Protocol):
    """Source of guesses."""

    count: int  # tokens to guess at most in a step

    def draft(self, text: Sequence[int], count: int) -> Draft:
        """Guess up to `count` tokens after `text`, prompt included. From call to call, `text` only grows."""


@dataclass
class PromptLookup:
    """Guesses by prompt lookup: what followed the last `ngram_size` tokens, or fewer, the last time that they stood in the text.

    Raises:
        ElmExportError: counts below 1.
    """

    count: int
    ngram_size: int = 3
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)  # where the text goes on after the latest of each n-gram
    _indexed: int = 0

    def __post_init__(self) -> None:
        for what, value in (("--prompt-lookup", self.count), ("--ngram-size", self.ngram_size)):
            if value < 1:
                raise ElmExportError(f"{what} is {value}; it must be 1 or above")

    def draft(self, text: Sequence[int], count: int) -> Draft:
        # The n-grams that end with the text's last token come next time: nothing follows them yet.
        for end in range(self._indexed + 1, len(text)):
            for size in range(1, min(self.ngram_size, end) + 1):
                self._after[tuple(text[end - size : end])] = end
        self._indexed = max(self._indexed, len(text) - 1)
        for size in range(min(self.ngram_size, len(text)), 0, -1):
            start = self._after.get(tuple(text[-size:]))
            if start is not None:
                tokens: list[int] = []
                for place in range(start, start + count):  # beyond the text's end lies what was guessed: a short period goes on
                    tokens.append(text[place] if place < len(text) else tokens[place - len(text)])
                return Draft(tokens)
        return Draft([])


class DraftModel:
    """Guesses by a smaller model of the same tokenizer, chosen as the large one's tokens are: the most likely, or drawn."""

    def __init__(self, runtime: Runtime, sampling: Sampling, count: int) -> None:
        """
        Raises:
            ElmExportError: `count` below 1, or an artifact that gives no logits, which drawing needs.
        """
        if count < 1:
            raise ElmExportError(f"--num-draft-tokens is {count}; it must be 1 or above")
        if runtime.only_greedy is not None:
            raise ElmExportError(f"the draft model cannot guess: {runtime.only_greedy}")
        self.count = count
        self._runtime, self._sampler = runtime, Sampler(sampling, guesses=True)
        self._known: list[int] = []  # the tokens in its cache

    def draft(self, text: Sequence[int], count: int) -> Draft:
        settings, tokens, probabilities = self._sampler.settings, list(text), []
        shared = _shared_prefix(self._known, text[:-1])
        while len(tokens) < len(text) + count and len(tokens) <= self._runtime.context:
            logits = self._runtime.logits(tokens[shared:], shared, last=1)[0]
            self._known, shared = list(tokens), len(tokens)
            if settings.temperature:
                probabilities.append(settings.probabilities(logits, tokens))
                tokens.append(self._sampler.draw(probabilities[-1]))
            else:
                tokens.append(self._sampler(logits, tokens))
        return Draft(tokens[len(text) :], probabilities if settings.temperature else None)


def _shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def read(runtime: Runtime, ids: Sequence[int], position: int) -> NDArray[np.float32]:
    """Logits `[tokens, vocab]` of `ids`, whose rounding does not depend on how many they are, where the engine can have it so."""
    wanted = min(runtime.step_tokens, runtime.context - position)
    given = [*ids, *[ids[-1]] * (wanted - len(ids))]  # the engine's next call overwrites what is too much
    return runtime.logits(given, position)[: len(ids)]


def margin_of(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Margin between the two best logits that a token must have, given the logits of the same tokens computed in two ways."""
    return _FACTOR * float(np.abs(one - other).max())


def trusted(margin: float, runtime: Runtime) -> bool:
    """Whether a token of that margin is surely the one of the other way of computing."""
    return margin <= (_TRUSTED if runtime.smooth else 0)


def too_close(scores: NDArray[np.float64], margin: float) -> bool:
    """Whether the two best of `scores` `[vocab]` are nearer than `margin`."""
    second, best = np.partition(scores, -2)[-2:]
    return bool(best - second < margin)


class SpeculativeDecoder:
    """Decoding with guesses. The cache of `runtime` holds all of a text but its last token before and after each step."""

    def __init__(self, runtime: Runtime, sampler: Sampler, drafter: Drafter) -> None:
        self.speculation = Speculation()
        self._runtime, self._sampler, self._drafter = runtime, sampler, drafter
        self._count = drafter.count  # of the next step
        self._trial: list[NDArray[np.float32]] = []  # logits of tokens that were decoded plainly
        self._margin: float | None = None  # between the two best logits, that a token must have; None: not known yet
        self._plain = 0  # tokens of the cache that were written one by one

    def step(self, text: Sequence[int], most: int) -> list[int]:
        """The next tokens after `text`, at least one and at most `most`."""
        greedy = not self._sampler.settings.temperature
        if greedy and (self._margin is None or self.speculation.note is not None):
            return [self._plain_step(text)]
        room = min(self._count, most - 1, self._runtime.context - len(text))
        draft = self._drafter.draft(text, room) if room > 0 else Draft([])
        rows = read(self._runtime, [text[-1], *draft.tokens], len(text) - 1)
        found = self._verify_greedy(list(text), draft, rows) if greedy else self._verify_sampled(list(text), draft, rows)
        if draft.tokens:
            self.speculation.steps += 1
            self.speculation.drafted += len(draft.tokens)
            self.speculation.accepted += len(found) - 1
            # One guess more than were accepted, two more where all were: reading what is then thrown away costs most.
            self._count = min(self._drafter.count, len(found) + (len(found) > len(draft.tokens)))
        return found

    def _plain_step(self, text: Sequence[int]) -> int:
        row = read(self._runtime, [text[-1]], len(text) - 1)[0]
        if self._margin is None:
            self._trial.append(row)
            if len(self._trial) == TRIAL:
                self._compare(text)
        return self._sampler(row, text)

    def _compare(self, text: Sequence[int]) -> None:
        """Read the tokens of the trial again, at once, and see how much that changes."""
        self._plain = len(text) - TRIAL
        again = read(self._runtime, text[-TRIAL:], self._plain)
        self._margin = margin_of(again, np.stack(self._trial))
        self._trial = []
        if not trusted(self._margin, self._runtime):
            self.speculation.note = f"{self._runtime.name} rounds otherwise when it reads several tokens at once, so nothing was guessed: the text is that of plain decoding"
            self._repeat(text)

    def _repeat(self, text: Sequence[int]) -> NDArray[np.float32]:
        """Write what the cache should hold one by one, as plain decoding does, and return the logits `[vocab]` after `text`."""
        for position in range(self._plain, len(text)):
            row = read(self._runtime, [text[position]], position)[0]
        self.speculation.repeated += len(text) - self._plain
        self._plain = len(text)
        return row

    def _verify_greedy(self, text: list[int], draft: Draft, rows: NDArray[np.float32]) -> list[int]:
        found: list[int] = []
        for i, row in enumerate(rows):
            scores = self._sampler.settings.scores(row, text)
            token, repeated = int(scores.argmax()), False
            if self._margin and too_close(scores, self._margin):
                token, repeated = self._sampler(self._repeat(text), text), True
            found.append(token)
            text.append(token)
            if repeated or i == len(draft.tokens) or token != draft.tokens[i]:  # what was read after a repeated token is gone
                break
        return found

    def _verify_sampled(self, text: list[int], draft: Draft, rows: NDArray[np.float32]) -> list[int]:
        """Accept a guess with probability min(1, p / q), else draw from max(0, p - q): together that is p (arXiv:2211.17192, appendix A.1)."""
        settings = self._sampler.settings
        found: list[int] = []
        for i, guess in enumerate(draft.tokens):
            wanted = settings.probabilities(rows[i], text)
            guessed = np.eye(1, len(wanted), guess)[0] if draft.probabilities is None else draft.probabilities[i]
            if self._sampler.generator.random() * guessed[guess] >= wanted[guess]:
                rest = np.maximum(wanted - guessed, 0)
                return [*found, self._sampler.draw(rest / rest.sum())]
            found.append(guess)
            text.append(guess)
        return [*found, self._sampler(rows[len(draft.tokens)], text)]
