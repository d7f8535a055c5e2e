"""Generation of several texts at once: a step reads one token of each, so that the weights are read once for all of them.

Each text is what it is alone. Engines may round otherwise when they read several tokens at once, so the first steps of every number of
texts are made alone, too. Where that gives the very same numbers, texts go on together; or where it gives nearly the same, in engines that
round nothing to few bits: tokens about as likely as others are then decoded again, alone. Otherwise the texts go on one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from elmexport.runtimes.base import Runtime
from elmexport.runtimes.generation import Stop
from elmexport.runtimes.sampler import Sampler, Sampling
from elmexport.runtimes.sequences import Sequences
from elmexport.runtimes.speculation import margin_of, too_close, trusted

TEXTS = 16  # at once; more gain little, and each has a cache
_TRIALS = 2  # steps of each number of texts that are made alone, too


def text_groups(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    """Cut texts of `lengths` tokens into runs of neighbours to decode at once.

    A run has at most `TEXTS` texts, which, each as long as its longest, have at most `tokens` tokens; or one text.
    """
    start = 0
    for end in range(1, len(lengths) + 1):
        size = end + 1 - start
        if end == len(lengths) or size > TEXTS or size * max(lengths[start : end + 1]) > tokens:
            yield slice(start, end)
            start = end


class BatchDecoder:
    """Decoding of several texts at once. `note` says, once it is known, why the engine cannot, and texts are decoded one by one."""

    def __init__(self, runtime: Runtime, sampling: Sampling, *, max_tokens: int, eos_ids: Collection[int]) -> None:
        self.note: str | None = None
        if runtime.smooth and sampling.temperature and sampling.seed is not None:
            self.note = f"{runtime.name} rounds otherwise when it reads several texts at once, which may change what a seed draws, so each was decoded alone"
        self._runtime, self._sampling, self._max_tokens, self._eos_ids = runtime, sampling, max_tokens, eos_ids
        self._margin = 0.0  # between the two best logits, that a token must have; 0: all numbers were the same
        self._trials: dict[int, int] = {}  # steps that were made alone, too, of each number of texts

    def decode(self, prompts: Sequence[Sequence[int]], give: Callable[[int, int], bool]) -> list[Stop]:
        """Continue `prompts`, and hand each token to `give` with its text's number from 0, until that says false; why each ended.

        Raises:
            ElmExportError: ids outside the vocabulary.
        """
        lengths = [min(len(prompt) + self._max_tokens, self._runtime.context) for prompt in prompts]
        with self._runtime.sequences(lengths) as sequences:
            return _Batch(self, sequences, prompts).decode(give)

    def rows(self, batch: _Batch, active: list[int]) -> dict[int, NDArray[np.float32]]:
        """Logits `[vocab]` after each of the texts `active`."""
        if self.note is not None:
            return {i: batch.repeat(i) for i in active}
        count = len(active)
        found = {active[0]: batch.alone(active[0])} if count == 1 else batch.together(active)
        if count > 1 and self._trials.get(count, 0) < _TRIALS:
            self._trials[count] = self._trials.get(count, 0) + 1
            again = {i: batch.alone(i) for i in active}
            self._margin = max(self._margin, margin_of(np.stack([found[i] for i in active]), np.stack([again[i] for i in active])))
            if not trusted(self._margin, self._runtime):
                self.note = f"{self._runtime.name} rounds otherwise when it reads several texts at once, so each was decoded alone"
                return {i: batch.repeat(i) for i in active}
            found = again
        if self._margin and not self._sampling.temperature:
            for i in active:
                if batch.plain[i] < len(batch.texts[i]) and too_close(self._sampling.scores(found[i], batch.texts[i]), self._margin):
                    found[i] = batch.repeat(i)
        return found

    def stop(self, text: Sequence[int], count: int) -> Stop | None:
        """Reason for which `text` ends with its token number `count`, or None."""
        if count == self._max_tokens:
            return "max tokens"
        return "context full" if len(text) > self._runtime.context else None

    def ends(self, token: int) -> bool:
        """Whether `token` ends texts."""
        return token in self._eos_ids

    def sampler(self) -> Sampler:
        """A sampler of one text, which draws as if it were alone."""
        return Sampler(self._sampling)


class _Batch:
    """Texts of one batch. The cache of each holds all but its last token before and after a step; `plain` counts tokens that were written alone."""

    def __init__(self, decoder: BatchDecoder, sequences: Sequences, prompts: Sequence[Sequence[int]]) -> None:
        self.texts = [list(prompt) for prompt in prompts]
        self.plain = [0] * len(prompts)
        self._decoder, self._sequences = decoder, sequences

    def decode(self, give: Callable[[int, int], bool]) -> list[Stop]:
        decoder, texts = self._decoder, self.texts
        samplers, counts = [decoder.sampler() for _ in texts], [0] * len(texts)
        stops: dict[int, Stop] = {}
        rows = {i: self._read(i, 0) for i in range(len(texts))}
        while rows:
            for i, row in rows.items():
                token = samplers[i](row, texts[i])
                if decoder.ends(token):
                    stops[i] = "end of text"
                    continue
                texts[i].append(token)
                counts[i] += 1
                if not give(i, token):
                    stops[i] = "stop string"
                elif (stop := decoder.stop(texts[i], counts[i])) is not None:
                    stops[i] = stop
            active = [i for i in rows if i not in stops]
            rows = decoder.rows(self, active) if active else {}
        return [stops[i] for i in range(len(texts))]

    def together(self, numbers: list[int]) -> dict[int, NDArray[np.float32]]:
        """Feed the last token of each, at once."""
        texts = [self.texts[i] for i in numbers]
        rows = self._sequences.step(numbers, [text[-1] for text in texts], [len(text) - 1 for text in texts])
        return dict(zip(numbers, rows, strict=True))

    def alone(self, number: int) -> NDArray[np.float32]:
        """Feed the last token of one."""
        return self._read(number, len(self.texts[number]) - 1)

    def repeat(self, number: int) -> NDArray[np.float32]:
        """Feed one by one what was not written alone; at least the last token is."""
        for position in range(min(self.plain[number], len(self.texts[number]) - 1), len(self.texts[number])):
            row = self._sequences.read(number, self.texts[number][position : position + 1], position)
        self.plain[number] = len(self.texts[number])
        return row

    def _read(self, number: int, position: int) -> NDArray[np.float32]:
        row = self._sequences.read(number, self.texts[number][position:], position)
        if self.plain[number] == position:
            self.plain[number] = len(self.texts[number])
        return row
