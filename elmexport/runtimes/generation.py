"""Generation of text with a runtime: tokens until the end-of-text token, the number asked for, or a full context."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from elmexport.errors import ElmExportError
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.sampler import Sampler, Sampling
from elmexport.runtimes.speculation import Drafter, Speculation, SpeculativeDecoder, read

Stop = Literal["end of text", "max tokens", "context full", "stop string"]


class Generation(Iterator[int]):
    """The tokens of one continuation, as they are generated. `stop` says, once there are no more, why; `speculation` what guesses were worth."""

    def __init__(self, tokens: Iterator[int | Stop], speculation: Speculation | None = None) -> None:
        self._tokens = tokens
        self.stop: Stop | None = None
        self.speculation = speculation

    def __next__(self) -> int:
        if self.stop is not None:
            raise StopIteration
        token = next(self._tokens)
        if isinstance(token, str):
            self.stop = token
            raise StopIteration
        return token


def generate(
    runtime: Runtime,
    ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    eos_ids: Collection[int],
    drafter: Drafter | None = None,
) -> Generation:
    """Continue `ids` (BOS included by the caller) by up to `max_tokens` tokens. Any of `eos_ids` ends the text and is not given.

    With `drafter`, decoding is speculative.

    Raises:
        ElmExportError: `max_tokens` below 1, a temperature, penalty or guesses where the artifact gives no logits, or see `Runtime.logits`: no
            ids, unknown ids, more ids than the context holds.
    """
    if max_tokens < 1:
        raise ElmExportError(f"--max-tokens is {max_tokens}; it must be 1 or above")
    if runtime.only_greedy is not None:
        for what, given in (
            (f"--temperature is {sampling.temperature:g}", sampling.temperature),
            (f"--repetition-penalty is {sampling.repetition_penalty:g}", sampling.repetition_penalty != 1),
            ("guesses are to be verified", drafter is not None),
        ):
            if given:
                raise ElmExportError(f"{what}, but {runtime.only_greedy}, or use --temperature 0 alone")
    sampler = Sampler(sampling)
    decoder = None if drafter is None else SpeculativeDecoder(runtime, sampler, drafter)
    tokens = _generate(runtime, list(ids), max_tokens, sampler, eos_ids, decoder)
    return Generation(tokens, None if decoder is None else decoder.speculation)


def _generate(
    runtime: Runtime,
    text: list[int],
    max_tokens: int,
    sampler: Sampler,
    eos_ids: Collection[int],
    decoder: SpeculativeDecoder | None,
) -> Iterator[int | Stop]:
    """The cache holds all of `text` but its last token whenever a token is given out."""

    def next_tokens(most: int) -> list[int]:
        if runtime.only_greedy is not None:
            return [runtime.greedy(text[-1:], len(text) - 1)]
        if decoder is not None:
            return decoder.step(text, most)
        return [sampler(read(runtime, text[-1:], len(text) - 1)[0], text)]

    tokens = [runtime.greedy(text)] if runtime.only_greedy is not None else [sampler(runtime.logits(text, last=1)[-1], text)]
    count = 0
    while True:
        for token in tokens:
            if token in eos_ids:
                yield "end of text"
                return
            text.append(token)
            count += 1
            yield token
        if count == max_tokens:
            yield "max tokens"
            return
        if len(text) > runtime.context:
            yield "context full"
            return
        tokens = next_tokens(max_tokens - count)
