"""Log-likelihoods of continuations over a runtime: what several requests share is read once.

Requests are sorted, so that those with a common beginning (the choices of one question, the few-shot examples of one task) follow each
other; the cache is rewound to what the next group shares with the last one, and a group's endings are read in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def score(runtime: Runtime, requests: Sequence[Request]) -> Iterator[tuple[int, Score]]:
    """Yield the index and the score of every request, in the order in which they are finished.

    A request that is too long loses the beginning of its context, as in lm-eval: the model reads the last `runtime.context` tokens of
    context and continuation without the very last token.

    Raises:
        ElmExportError: an empty context or continuation, or a continuation that the context cannot hold.
        VerificationError: the artifact gives values that are not finite.
    """
    work = sorted((_prepare(runtime, index, request) for index, request in enumerate(requests)), key=lambda item: item.ids)
    cached: tuple[int, ...] = ()
    for group, prefix in _groups(work):
        if len(group) == 1:
            (item,) = group
            start = min(shared(cached, item.ids), item.scored_from)
            logits = runtime.logits(item.ids[start:], start, last=len(item.targets))
            cached = item.ids
            yield item.index, _score(logits, item.targets)
            continue
        start = min(shared(cached, prefix), len(prefix) - 1)  # the prefix's last token is read in any case, for its logits
        after_prefix = runtime.logits(prefix[start:], start, last=1)
        cached = prefix
        endings = [item.ids[len(prefix) :] for item in group]
        longer = [ending for ending in endings if ending]
        read = iter(runtime.continuations(longer, len(prefix)) if longer else ())
        for item, ending in zip(group, endings, strict=True):
            logits = np.concatenate([after_prefix, next(read)]) if ending else after_prefix
            yield item.index, _score(logits[item.scored_from - len(prefix) + 1 :], item.targets)


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
