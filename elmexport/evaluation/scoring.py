"""Log-likelihoods of continuations over a runtime: what several requests share is read once.

Requests are sorted, so that those with a common beginning (the choices of one question, the few-shot examples of one task) follow each
other; the cache is rewound to what the next group shares with the last one, and a group's endings are read in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError, VerificationError
from elmexport.runtimes.base import Runtime

BATCH_TOKENS = 512  # of one batch of continuations, padding included: bounds the memory of their logits
REREAD = 16  # context tokens that a request may read again in order to join a batch


@dataclass(frozen=True)
class Request:
    """Continuation to score after a context. Both are token ids, neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Score:
    """Score of a continuation: `loglikelihood` in nats, summed over its tokens; `greedy`: each of them was the most likely one."""

    loglikelihood: float
    greedy: bool


@dataclass(frozen=True)
class _Work:
    index: int  # of the request
    ids: tuple[int, ...]  # what the model reads: all but the last token, which is only predicted
    targets: tuple[int, ...]  # the continuation

    @property
    def scored_from(self) -> int:
        """Place in `ids` whose logits predict the continuation's first token."""
        return len(self.ids) - len(self.targets)


def score(
    runtime: Runtime, requests: Sequence[Request], answered: Callable[[int], bool] = lambda index: False
) -> Iterator[tuple[int, Score]]:
    """Yield the index and the score of every request that is not `answered`, in the order in which they are finished.

    A request that is too long loses the beginning of its context, as in lm-eval: the model reads the last `runtime.context` tokens of
    context and continuation without the very last token.

    Scores do not depend on what is `answered`, to the last bit: requests are read in the company, and after the readings, that they would have if
    none were. Groups that are answered whole are not read, save for the beginnings that later ones share with them.

    Raises:
        ElmExportError: an empty context or continuation, or a continuation that the context cannot hold.
        VerificationError: the artifact gives values that are not finite.
    """
    work = sorted((_prepare(runtime, index, request) for index, request in enumerate(requests)), key=lambda item: item.ids)
    cache = _Cache(runtime)
    for group, prefix in _groups(work):
        wanted = [not answered(item.index) for item in group]
        if len(group) == 1:
            (item,) = group
            cache.plan(item.ids, min(cache.shared(item.ids), item.scored_from), len(item.targets))
            if wanted[0]:
                yield item.index, _score(cache.read(), item.targets)
            continue
        # The prefix's last token is read in any case, for its logits.
        cache.plan(prefix, min(cache.shared(prefix), len(prefix) - 1), 1)
        if not any(wanted):
            continue
        after_prefix = cache.read()
        endings = [item.ids[len(prefix) :] for item in group]
        longer = [ending for ending in endings if ending]
        read = iter(runtime.continuations(longer, len(prefix)) if longer else ())
        for item, ending, asked in zip(group, endings, wanted, strict=True):
            logits = np.concatenate([after_prefix, next(read)]) if ending else after_prefix
            if asked:
                yield item.index, _score(logits[item.scored_from - len(prefix) + 1 :], item.targets)


@dataclass(frozen=True)
class _Reading:
    """One call of the runtime: `ids` from `start` on, logits of the `last`."""

    ids: tuple[int, ...]
    start: int
    last: int


class _Cache:
    """Readings of one sequence that its cache consists of, each going on where it parts from those before; done when something is asked of them.

    How a token is rounded depends on how many are read with it, so what is done late is done in the same calls.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._readings: list[_Reading] = []
        self._done = 0  # of them

    def shared(self, ids: tuple[int, ...]) -> int:
        """How many of `ids` the cache will hold when all readings are done."""
        return shared(self._readings[-1].ids, ids) if self._readings else 0

    def plan(self, ids: tuple[int, ...], start: int, last: int) -> None:
        """Take up a reading; earlier ones that it overwrites whole are forgotten."""
        self._readings = [reading for reading in self._readings if reading.start < start]
        self._done = min(self._done, len(self._readings))
        self._readings.append(_Reading(ids, start, last))

    def read(self) -> NDArray[np.float32]:
        """Do what is not done yet; logits `[last, vocab]` of the last reading."""
        for reading in self._readings[self._done :]:
            logits = self._runtime.logits(reading.ids[reading.start :], reading.start, last=reading.last)
        self._done = len(self._readings)
        return logits


def _prepare(runtime: Runtime, index: int, request: Request) -> _Work:
    if not request.context or not request.continuation:
        raise ElmExportError("a log-likelihood needs a context and a continuation of one token or more each")
    if len(request.continuation) > runtime.context:
        raise ElmExportError(
            f"a continuation has {len(request.continuation)} tokens, this artifact holds {runtime.context}: export it with a larger --context, or choose another task"
        )
    ids = (*request.context, *request.continuation)[-(runtime.context + 1) :][:-1]
    return _Work(index, ids, tuple(request.continuation))


def _groups(work: Sequence[_Work]) -> Iterator[tuple[list[_Work], tuple[int, ...]]]:
    """Runs of neighbours worth one batch, each with the prefix that all of them share; no prefix passes where a member's scores begin."""
    group: list[_Work] = []
    prefix: tuple[int, ...] = ()
    for item in work:
        own = item.ids[: item.scored_from + 1]
        common = prefix[: shared(prefix, own)]
        members = [*group, item]
        if group and common and _worthwhile(members, len(common)):
            group, prefix = members, common
        else:
            if group:
                yield group, prefix
            group, prefix = [item], own
    if group:
        yield group, prefix


def _worthwhile(members: Sequence[_Work], prefix: int) -> bool:
    longest = max(len(item.ids) for item in members) - prefix
    return longest * len(members) <= BATCH_TOKENS and all(item.scored_from + 1 - prefix <= REREAD for item in members)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _score(logits: NDArray[np.float32], targets: Sequence[int]) -> Score:
    """`logits` `[tokens, vocab]`, row t predicts `targets[t]`."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    normalizer = top + np.log(np.exp(wide - top[:, None]).sum(axis=-1))
    chosen = wide[np.arange(len(targets)), list(targets)]
    total = float((chosen - normalizer).sum())
    if not np.isfinite(total):
        raise VerificationError(
            "the artifact gives logits that are not finite; its numbers overflow or its weights are damaged: export it again"
        )
    return Score(total, bool((logits.argmax(axis=-1) == np.asarray(targets)).all()))
