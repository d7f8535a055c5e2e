"""Timing of speculative decoding against plain decoding of the same text, in one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.text import bundled_text
from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.errors import ElmExportError
from elmexport.runtimes import artifact_kind
from elmexport.runtimes.artifact_tokenizer import artifact_tokenizer
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.draft_model import find_draft
from elmexport.runtimes.generation import generate
from elmexport.runtimes.sampler import Sampling
from elmexport.runtimes.speculation import Drafter, DraftModel, PromptLookup

_REPEATED, _TIMES = 24, 3  # tokens of the passage, and how often the prompt holds it


@dataclass(frozen=True)
class Guesses:
    """Source of guesses to measure: `prompt_lookup` tokens a step, or `draft_tokens` of `draft_model`."""

    prompt_lookup: int | None = None
    ngram_size: int = 3
    draft_model: str | None = None
    draft_tokens: int = 5

    @property
    def words(self) -> str:
        """Name in tables."""
        if self.draft_model is not None:
            return f"draft {self.draft_tokens} by {Path(self.draft_model).name}"
        return f"lookup {self.prompt_lookup}"

    def check(self, paths: Sequence[Path]) -> None:
        """Refuse what cannot be measured on the artifacts `paths`.

        Raises:
            ElmExportError: counts below 1, two sources, no such draft model, or one whose tokenizer is not that of every artifact.
            MissingDependencyError: a tokenizer's reader is not installed, or the hub cannot be reached.
        """
        if self.prompt_lookup is not None and self.draft_model is not None:
            raise ElmExportError("--prompt-lookup and --draft-model exclude each other; leave one of them out")
        if self.draft_model is not None:
            if self.draft_tokens < 1:
                raise ElmExportError(f"--num-draft-tokens is {self.draft_tokens}; it must be 1 or above")
            draft = find_draft(self.draft_model)
            for path in paths:
                draft.check_tokenizer(path, artifact_tokenizer(artifact_kind(path), path))
        else:
            PromptLookup(self.prompt_lookup or 0, self.ngram_size)


def measure_guesses(runtime: Runtime, path: Path, tokenizer: Tokenizer | None, guesses: Guesses, tokens: int) -> dict[str, Any]:
    """Decode up to `tokens` tokens after a prompt that repeats a passage, plainly and with `guesses`.

    Returns seconds of each, and counts of guesses; of prompt lookup in llama.cpp also `own`, what llama-cpp-python's takes (`time_own_lookup`).

    Raises:
        ElmExportError: a draft model of another vocabulary, or an artifact that gives no logits.
    """
    if runtime.context < _REPEATED * _TIMES + 2:
        raise ElmExportError(
            f"guesses are measured after {_REPEATED * _TIMES} tokens; {path.name} holds {runtime.context}: export with a larger --context"
        )
    draft = None
    if guesses.draft_model is not None:
        draft = find_draft(guesses.draft_model).open_for(path, runtime)
    runtime.prepare_generation()
    prompt = _prompt(runtime, tokenizer)
    tokens = min(tokens, runtime.context - len(prompt))

    def timed(drafter: Drafter | None) -> tuple[float, list[int], Any]:
        found = generate(runtime, prompt, max_tokens=tokens, sampling=Sampling(), eos_ids=(), drafter=drafter)
        first = next(found)  # with the prompt, whose time is no decoding
        start = time.perf_counter()
        rest = list(found)
        return time.perf_counter() - start, [first, *rest], found.speculation

    def drafter() -> Drafter:
        if draft is not None:
            return DraftModel(draft, Sampling(), guesses.draft_tokens)
        return PromptLookup(guesses.prompt_lookup or 0, guesses.ngram_size)

    timed(drafter())  # engines allocate, and some unpack weights, at the first call of each shape
    plain_s, plain, _ = timed(None)
    guessed_s, guessed, speculation = timed(drafter())
    assert guessed == plain, "speculative decoding gave another text"
    own = None
    if guesses.prompt_lookup is not None and runtime.name == "llama.cpp":
        from elmexport.bench.own_lookup import time_own_lookup

        own = time_own_lookup(path, prompt, tokens, runtime.context, count=guesses.prompt_lookup, ngram_size=guesses.ngram_size)
    return {
        "own": own,
        "tokens": len(plain) - 1,
        "plain_s": plain_s,
        "guessed_s": guessed_s,
        "accepted": speculation.accepted,
        "drafted": speculation.drafted,
        "mean_accepted": speculation.mean_accepted,
        "note": speculation.note,
    }


def _prompt(runtime: Runtime, tokenizer: Tokenizer | None) -> list[int]:
    """A passage of the bundled prose several times over; random tokens where there is no tokenizer."""
    if tokenizer is None:
        passage = np.random.default_rng(0).integers(0, runtime.vocab_size, _REPEATED).tolist()
        return passage * _TIMES
    text = bundled_text("weighting")[:2000]
    passage = tokenizer.encode(text, bos=False)[:_REPEATED]
    return [*tokenizer.special.prefix, *passage * _TIMES]
