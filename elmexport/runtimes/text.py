"""Text generation with an artifact, from text to text, and its tokenizer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from elmexport.checkpoint.tokenizer import StreamDecoder, Tokenizer
from elmexport.errors import ElmExportError
from elmexport.runtimes import artifact_kind, open_as
from elmexport.runtimes.artifact_tokenizer import artifact_tokenizer
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.batch_generation import BatchDecoder, text_groups
from elmexport.runtimes.draft_model import find_draft
from elmexport.runtimes.generation import Stop, generate
from elmexport.runtimes.sampler import Sampling
from elmexport.runtimes.speculation import Drafter, DraftModel, PromptLookup, Speculation, read

MEASURED = 16  # tokens decoded once more, to say how fast plain decoding is


@dataclass(frozen=True)
class TextOptions:
    """Options of a generated text.

    `stop`: texts that end it, the first one found is cut off with what follows. `prompt_lookup`: tokens to guess from what the text said before
    (`ngram_size` tokens that must be the same); a draft model's `num_draft_tokens` are guessed by that.

    Raises:
        ElmExportError: an empty text that is to end others.
    """

    max_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    prompt_lookup: int | None = None
    ngram_size: int = 3
    num_draft_tokens: int = 5

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ElmExportError("a stop string is empty, so every text would end at once; give --stop some text, or leave it out")


@dataclass(frozen=True)
class Completion:
    """A generated text, and how it came about."""

    text: str
    tokens: tuple[int, ...]  # those that `text` was made of, and in a text that a stop string ended perhaps more
    stop: Stop
    prompt_tokens: int
    seconds: (
        float  # of all tokens but the first, whose time is that of reading the prompt; with other texts, where they were decoded at once
    )
    plain_rate: float | None  # tokens per second of plain decoding, measured on the last tokens; None where nothing was guessed
    speculation: Speculation | None

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds > 0 else None


class TextModel:
    """An artifact that is open with its tokenizer: from text to text."""

    def __init__(self, name: str, runtime: Runtime, tokenizer: Tokenizer, draft: Runtime | None = None) -> None:
        """`name` stands for the artifact in messages. `draft` guesses for `runtime`, with the same tokenizer."""
        self.name, self.runtime, self.tokenizer, self._draft = name, runtime, tokenizer, draft
        runtime.prepare_generation()

    def complete(self, prompt: str, options: TextOptions, write: Callable[[str], None] = lambda text: None) -> Completion:
        """Continue `prompt`, which is read after BOS where the model has one, and hand the text to `write` piece by piece.

        Raises:
            ElmExportError: a prompt that is not text, has no token, or is too long for the context; or see `generate`.
        """
        return self.complete_ids(self.encode(prompt), options, write)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of `prompt`, after BOS where the model has one.

        Raises:
            ElmExportError: a prompt that is not text.
        """
        return self.tokenizer.encode(text_of(prompt))

    def complete_ids(self, ids: Sequence[int], options: TextOptions, write: Callable[[str], None] = lambda text: None) -> Completion:
        """Continue token ids; see `complete`."""
        self.check_fits(len(ids))
        answer = _Answer(self.tokenizer, ids, options, write)
        tokens = generate(
            self.runtime,
            ids,
            max_tokens=options.max_tokens,
            sampling=options.sampling,
            eos_ids=self.tokenizer.special.eos,
            drafter=self._drafter(options),
        )
        for token in tokens:
            if not answer.feed(token):
                break
        done = answer.finish(tokens.stop or "max tokens")
        if tokens.speculation is None:
            return done
        rate = self._plain_rate([*ids, *done.tokens]) if tokens.speculation.steps else None
        return replace(done, plain_rate=rate, speculation=tokens.speculation)

    def complete_many(
        self,
        prompts: Sequence[Sequence[int]],
        options: TextOptions,
        write: Callable[[str], None] = lambda text: None,
        note: Callable[[str], None] = lambda line: None,
    ) -> Iterator[Completion]:
        """Continue the token ids of each of `prompts`; see `complete`. Texts are what they are alone, and come in the order of the prompts.

        Neighbours are decoded at once where the engine can and nothing is guessed; `write` gets each of these whole. `note` hears why not,
        where that depends on the artifact.

        Raises:
            ElmExportError: as `complete`, before anything is computed.
        """
        for ids in prompts:
            self.check_fits(len(ids))
        return self._complete_many(prompts, options, write, note)

    def _complete_many(
        self, prompts: Sequence[Sequence[int]], options: TextOptions, write: Callable[[str], None], note: Callable[[str], None]
    ) -> Iterator[Completion]:
        runtime, context = self.runtime, self.runtime.context
        if self._drafter(options) is not None or runtime.only_greedy is not None or options.max_tokens < 1:
            tokens = 0
        else:
            tokens = runtime.batch_tokens
        batches = BatchDecoder(runtime, options.sampling, max_tokens=options.max_tokens, eos_ids=self.tokenizer.special.eos)
        for part in text_groups([min(len(ids) + options.max_tokens, context) for ids in prompts], tokens):
            group = prompts[part]
            if len(group) == 1 or batches.note is not None:
                yield from (self.complete_ids(ids, options, write) for ids in group)
                continue
            answers = [_Answer(self.tokenizer, ids, options) for ids in group]
            stops = batches.decode(group, lambda i, token, answers=answers: answers[i].feed(token))  # type: ignore[misc]
            for answer, stop in zip(answers, stops, strict=True):
                done = answer.finish(stop)
                write(done.text)
                yield done
        if batches.note is not None and tokens and len(prompts) > 1:
            note(batches.note)

    def check_fits(self, count: int) -> None:
        """Refuse a prompt of `count` tokens that cannot be continued.

        Raises:
            ElmExportError: a prompt of `count` tokens is empty, or too long for the context.
        """
        if not count:
            raise ElmExportError("the prompt is empty, and this model has no token that begins a text; give it a word to begin with")
        if count > self.runtime.context:
            raise ElmExportError(
                f"the prompt has {count} tokens, which need a context of as many; this artifact holds {self.runtime.context}, prompt and answer "
                "together: shorten the prompt, or export it with a larger --context"
            )

    def _drafter(self, options: TextOptions) -> Drafter | None:
        if self._draft is not None:
            if options.prompt_lookup is not None:
                raise ElmExportError("--prompt-lookup and --draft-model exclude each other; leave one of them out")
            return DraftModel(self._draft, options.sampling, options.num_draft_tokens)
        return None if options.prompt_lookup is None else PromptLookup(options.prompt_lookup, options.ngram_size)

    def _plain_rate(self, text: Sequence[int]) -> float:
        """Tokens per second of plain decoding: the last tokens of `text` once more, one by one."""
        end = min(len(text), self.runtime.context, self.runtime.length)
        first = max(1, end - MEASURED)
        start = time.perf_counter()
        for position in range(first, end):
            read(self.runtime, [text[position]], position)
        return (end - first) / (time.perf_counter() - start)

    def close(self) -> None:
        """Release the engines' memory."""
        self.runtime.close()
        if self._draft is not None:
            self._draft.close()


def open_text_model(path: Path, *, tokenizer: Path | None = None, draft: str | None = None) -> TextModel:
    """Open the artifact `path`, and the artifact or model `draft` that guesses for it (see `find_draft`).

    `tokenizer` is a tokenizer file, the artifact's own where None.

    Raises:
        ElmExportError: see `open_artifact`, `artifact_tokenizer` and `find_draft`; a draft model of another vocabulary.
        MissingDependencyError: the engine is not installed, or a hub that cannot be reached.
    """
    kind = artifact_kind(path)
    chosen = artifact_tokenizer(kind, path, tokenizer)
    found = None if draft is None else find_draft(draft, tokenizer)
    if found is not None:
        found.check_tokenizer(path, chosen)
    runtime = open_as(kind, path)
    return TextModel(path.name, runtime, chosen, None if found is None else found.open_for(path, runtime))


class _Answer:
    """The text that continues `ids`, token by token."""

    def __init__(
        self, tokenizer: Tokenizer, ids: Sequence[int], options: TextOptions, write: Callable[[str], None] = lambda text: None
    ) -> None:
        self._decoder, self._ends, self._write = StreamDecoder(tokenizer, ids), StopStrings(options.stop), write
        self._prompt_tokens = len(ids)
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._start = self._end = time.perf_counter()

    def feed(self, token: int) -> bool:
        """Take a token; whether the text goes on, which it does not after a stop string."""
        self._tokens.append(token)
        if len(self._tokens) == 1:
            self._start = time.perf_counter()
        self._give(self._ends.feed(self._decoder.feed(token)))
        self._end = time.perf_counter()
        return not self._ends.found

    def finish(self, stop: Stop) -> Completion:
        """The whole, which ended because of `stop` if not because of a stop string."""
        if not self._ends.found:
            self._give(self._ends.feed(self._decoder.finish()))
            self._give(self._ends.finish())
        stop = "stop string" if self._ends.found else stop
        seconds = max(0.0, self._end - self._start)
        return Completion("".join(self._pieces), tuple(self._tokens), stop, self._prompt_tokens, seconds, None, None)

    def _give(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._write(text)


class StopStrings:
    """Texts that end a text which comes in pieces: what may be the beginning of one is held back."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.found = False
        self._texts, self._held = texts, ""

    def feed(self, piece: str) -> str:
        """Take a piece; returns the part of the text so far that can be shown and was not."""
        self._held += piece
        places = [place for text in self._texts if (place := self._held.find(text)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        held = max((size for text in self._texts for size in range(1, len(text)) if self._held.endswith(text[:size])), default=0)
        shown, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        return shown

    def finish(self) -> str:
        """The rest, when nothing follows."""
        rest, self._held = "" if self.found else self._held, ""
        return rest


def text_of(prompt: str) -> str:
    """`prompt`, if it is text.

    Raises:
        ElmExportError: bytes of an argument that could not be decoded.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ElmExportError(f"the prompt {prompt!r} is not text in the encoding {sys.getfilesystemencoding()}; use UTF-8") from None
    return prompt
