"""Draft models of speculative decoding: an artifact, or a model as exports take it, found and checked before anything is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elmexport.artifact import MANIFEST
from elmexport.checkpoint import open_checkpoint, open_tokenizer, require_tokenizer
from elmexport.checkpoint.local import holds_checkpoint
from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.errors import ElmExportError
from elmexport.formats import formats
from elmexport.models import find_model, known_models
from elmexport.runtimes import CHECKPOINT, artifact_kind, open_as
from elmexport.runtimes.artifact_tokenizer import artifact_tokenizer, same_tokens
from elmexport.runtimes.base import Runtime

_FIX = "use a smaller model of the same family, or another quantization of the same model"


@dataclass(frozen=True)
class FoundDraft:
    """Draft model that is not open yet."""

    name: str
    tokenizer: Tokenizer
    open_runtime: Callable[[], Runtime]

    def check_tokenizer(self, path: Path, tokenizer: Tokenizer) -> None:
        """Refuse to guess for `path`, whose tokenizer is another one.

        Raises:
            ElmExportError: texts have other ids, or end otherwise.
        """
        if not same_tokens(tokenizer, self.tokenizer):
            raise ElmExportError(
                f"the draft model {self.name} has another tokenizer than {path}, so its guesses would mean other words; {_FIX}"
            )

    def open_for(self, path: Path, runtime: Runtime) -> Runtime:
        """Open it, to guess for `path`, which is open.

        Raises:
            ElmExportError: damaged files, or another vocabulary.
            MissingDependencyError: the engine is not installed.
        """
        draft = self.open_runtime()
        if draft.vocab_size != runtime.vocab_size:
            raise ElmExportError(f"the draft model {self.name} has {draft.vocab_size} tokens, {path} has {runtime.vocab_size}; {_FIX}")
        draft.prepare_generation()
        return draft


def find_draft(draft: str, tokenizer: Path | None = None) -> FoundDraft:
    """Find a draft model: an artifact or bare model file, or what `open_checkpoint` takes.

    The latter, a checkpoint, a name like `tiny` or a hub id, torch runs.
    `tokenizer` is a tokenizer's file to take instead of its own. Weights from the hub are downloaded here, where the cache lacks them.

    Raises:
        ElmExportError: neither, unusable files, a download that failed, or no tokenizer.
        MissingDependencyError: the hub cannot be reached.
    """
    kind = _kind(draft)
    if kind != CHECKPOINT:
        path = Path(draft).expanduser()
        return FoundDraft(draft, artifact_tokenizer(kind, path, tokenizer), lambda: open_as(kind, path))
    checkpoint = open_checkpoint(draft, tokenizer=None if tokenizer is None else str(tokenizer))
    checkpoint.tokenizer_path = require_tokenizer(checkpoint)
    own = open_tokenizer(checkpoint)
    assert own is not None

    def open_runtime() -> Runtime:
        from elmexport.runtimes.torch import TorchRuntime

        return TorchRuntime(checkpoint)

    return FoundDraft(draft, own, open_runtime)


def _kind(draft: str) -> str:
    """Tell what `draft` names: a format, or `CHECKPOINT`. A model's name means a folder of that name only if that holds a model."""
    named = bool(draft.strip())
    path, known = Path(draft).expanduser(), named and find_model(draft) is not None
    try:
        exists = named and path.exists()
    except OSError:  # no name that a file can have
        exists = False
    if exists and (path / MANIFEST).is_file():
        return artifact_kind(path)
    if known or (exists and holds_checkpoint(path)):
        return CHECKPOINT
    if exists or path.suffix in {suffix for row in formats() for suffix in row.suffixes}:
        return artifact_kind(path)
    if draft.count("/") == 1 and all(draft.split("/")) and not draft.startswith((".", "~")):
        return CHECKPOINT  # a hub id
    names = ", ".join(model.alias for model in known_models())
    raise ElmExportError(
        f"--draft-model {draft}: no such file or folder, and no model; give an artifact, a checkpoint's folder, one of {names}, or a hub id (owner/name)"
    )
