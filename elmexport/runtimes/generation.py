"""Generation of text with a runtime: tokens one at a time, until the end-of-text token, the number asked for, or a full context."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from elmexport.errors import ElmExportError
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.sampler import Sampler, Sampling

Stop = Literal["end of text", "max tokens", "context full"]


class Generation(Iterator[int]):
    """The tokens of one continuation, as they are generated. `stop` says, once there are no more, why."""

    def __init__(self, tokens: Iterator[int | Stop]) -> None:
        self._tokens = tokens
        self.stop: Stop | None = None

    def __next__(self) -> int:
        if self.stop is not None:
            raise StopIteration
        token = next(self._tokens)
        if isinstance(token, str):
            self.stop = token
            raise StopIteration
        return token


def generate(runtime: Runtime, ids: Sequence[int], *, max_tokens: int, sampling: Sampling, eos_ids: Collection[int]) -> Generation:
    """Continue `ids` (BOS included by the caller) by up to `max_tokens` tokens. Any of `eos_ids` ends the text and is not given.

    Raises:
        ElmExportError: `max_tokens` below 1, a temperature where the artifact gives no logits to draw by, or see `Runtime.logits`: no ids, unknown ids, more ids than the context holds.
    """
    if max_tokens < 1:
        raise ElmExportError(f"max-tokens is {max_tokens}; it must be 1 or above")
    if runtime.only_greedy is not None and sampling.temperature:
        raise ElmExportError(f"temperature is {sampling.temperature:g}, but {runtime.only_greedy}, or use --temperature 0")
    return Generation(_generate(runtime, ids, max_tokens, sampling, eos_ids))


def _generate(runtime: Runtime, ids: Sequence[int], max_tokens: int, sampling: Sampling, eos_ids: Collection[int]) -> Iterator[int | Stop]:
    choose = Sampler(sampling)

    def next_token(ids: Sequence[int], position: int) -> int:
        if runtime.only_greedy is not None:
            return runtime.greedy(ids, position)
        return choose(runtime.logits(ids, position, last=1)[-1])

    token = next_token(ids, 0)
    for count in range(1, max_tokens + 1):
        if token in eos_ids:
            yield "end of text"
            return
        yield token
        if count < max_tokens:
            if runtime.length == runtime.context:
                yield "context full"
                return
            token = next_token([token], runtime.length)
    yield "max tokens"
