"""Completions of the same prompts by several models side by side, and where each first differs from the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.evaluation.evaluated_model import FP16, find_reference
from elmexport.progress import Progress, SilentProgress
from elmexport.runtimes import artifact_kind, open_as
from elmexport.runtimes.artifact_tokenizer import artifact_tokenizer, same_tokens
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.text import TextModel, TextOptions

MAX_TOKENS = 48


@dataclass(frozen=True)
class ComparedText:
    """One model's completion of a prompt: `shared` with the reference, and what follows the first token that differs."""

    shared: str
    rest: str  # begins with the token that differs; empty where the texts are the same
    diverges_at: int | None  # tokens before the first that differs; None where none does
    tokens: int


@dataclass(frozen=True)
class ComparedModel:
    """A model's completions, one for each prompt."""

    name: str
    texts: tuple[ComparedText, ...]
    # Median of tokens until the first difference, all tokens where there is none; None for what others are compared with, and of another tokenizer.
    divergence: float | None


@dataclass(frozen=True)
class SideBySide:
    """Greedy completions of `prompts`; the first of `models` is what the others are compared with."""

    prompts: tuple[str, ...]
    models: tuple[ComparedModel, ...]
    max_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "prompts": list(self.prompts),
            "max_tokens": self.max_tokens,
            "models": [
                {
                    "name": model.name,
                    "divergence": model.divergence,
                    "completions": [
                        {"text": one.shared + one.rest, "diverges_at": one.diverges_at, "tokens": one.tokens} for one in model.texts
                    ],
                }
                for model in self.models
            ],
        }


def side_by_side(
    artifacts: Sequence[Path],
    prompts: Sequence[str],
    *,
    against: str | None = FP16,
    max_tokens: int = MAX_TOKENS,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
) -> SideBySide:
    """Complete `prompts` greedily with `against` and with each of `artifacts`.

    `against`: "fp16", which is the model that the first artifact was made from, a path, or None.

    Raises:
        ElmExportError: an artifact without a tokenizer, a reference that cannot be found (see `find_reference`), or a prompt that is too long.
        MissingDependencyError: an engine is not installed.
    """
    progress = progress or SilentProgress()
    tokenizers = [artifact_tokenizer(artifact_kind(path), path, tokenizer) for path in artifacts]
    models = [(path.resolve().name, _opener(path), own) for path, own in zip(artifacts, tokenizers, strict=True)]
    if against is not None:
        reference = find_reference(artifacts[0], against, progress=progress)
        models.insert(0, (reference.subject.label, reference.open_runtime, tokenizers[0]))
    found: list[list[tuple[str, tuple[int, ...]]]] = []
    for name, open_runtime, own in models:
        progress.stage(name, len(prompts))
        model = TextModel(name, open_runtime(), own)
        found.append([])
        for prompt in prompts:
            done = model.complete(prompt, TextOptions(max_tokens))
            found[-1].append((done.text, done.tokens))
            progress.advance(1)
        model.close()  # large models do not fit in memory together
    compared = []
    for i, ((name, _, own), completions) in enumerate(zip(models, found, strict=True)):
        if not same_tokens(own, models[0][2]):
            compared.append(ComparedModel(name, tuple(ComparedText(text, "", None, len(tokens)) for text, tokens in completions), None))
            continue
        texts = tuple(
            _compared(own, prompt, text, tokens, wanted)
            for prompt, (text, tokens), (_, wanted) in zip(prompts, completions, found[0], strict=True)
        )
        lengths = [one.tokens if one.diverges_at is None else one.diverges_at for one in texts]
        compared.append(ComparedModel(name, texts, None if i == 0 else float(median(lengths))))
    return SideBySide(tuple(prompts), tuple(compared), max_tokens)


def _opener(path: Path) -> Callable[[], Runtime]:
    return lambda: open_as(artifact_kind(path), path)


def _compared(tokenizer: Tokenizer, prompt: str, text: str, tokens: tuple[int, ...], wanted: tuple[int, ...]) -> ComparedText:
    same = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), min(len(tokens), len(wanted)))
    if tokens == wanted:
        return ComparedText(text, "", None, len(tokens))
    ids = tokenizer.encode(prompt)
    cut = len(tokenizer.decode([*ids, *tokens[:same]]).rstrip("\ufffd")) - len(tokenizer.decode(ids))  # a character may be cut in two
    return ComparedText(text[: max(0, cut)], text[max(0, cut) :], same, len(tokens))
