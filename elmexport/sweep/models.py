"""Models of a sweep: opened once, for what decides the keys of their cells and for what every command has to be told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from elmexport.artifact import file_sha256
from elmexport.checkpoint import open_checkpoint, require_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.models import find_model
from elmexport.progress import Progress
from elmexport.sweep.plan import ModelChoice

_HUB = "hub:"


@dataclass(frozen=True)
class SweepModel:
    """A model of the plan, opened."""

    choice: ModelChoice  # paths made absolute
    written: str  # as the plan names it, for exclusions
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        return self.checkpoint.source.name

    @cached_property
    def determinants(self) -> dict[str, object]:
        """All that decides what exports of the model are made from; reads every weight once."""
        tokenizer = self.checkpoint.tokenizer_path
        return {
            "name": self.name,
            "origin": self.checkpoint.source.origin,
            "identity": self.checkpoint.identity(),
            "tokenizer": None if tokenizer is None else file_sha256(tokenizer),
        }

    @property
    def export_options(self) -> list[str]:
        """Options of an export that name the model; a hub model is pinned to the commit that was found."""
        choice, source = self.choice, self.checkpoint.source
        revision = source.revision if source.origin.startswith(_HUB) else None
        options = ["--model", choice.model]
        for name, value in (
            *(("--revision", revision), ("--tokenizer", choice.tokenizer), ("--adapter", choice.adapter)),
            ("--random-weights", None if choice.random_weights is None else str(choice.random_weights)),
        ):
            options += [] if value is None else [name, value]
        return options

    @property
    def eval_options(self) -> list[str]:
        """Options of an evaluation that name the reference, where the artifact's manifest does not say how to find it."""
        options = ["--against", self.choice.model] if Path(self.choice.model).is_absolute() and self.choice.random_weights is None else []
        return options + ([] if self.choice.adapter is None else ["--adapter", self.choice.adapter])


def open_model(choice: ModelChoice, folder: Path, progress: Progress) -> SweepModel:
    """Open a model of a plan that lies in `folder`.

    Raises:
        ElmExportError: see `open_checkpoint` and `require_tokenizer`.
    """
    absolute = ModelChoice(
        _path(choice.model, folder) if find_model(choice.model) is None else choice.model,
        choice.revision,
        None if choice.tokenizer is None else _path(choice.tokenizer, folder),
        None if choice.adapter is None else str(_absolute(choice.adapter, folder)),
        choice.random_weights,
    )
    checkpoint = open_model_checkpoint(absolute, progress)
    return SweepModel(absolute, choice.model, checkpoint)


def open_model_checkpoint(choice: ModelChoice, progress: Progress) -> Checkpoint:
    """Open the checkpoint of a model whose paths are absolute.

    Raises:
        ElmExportError: see `open_checkpoint` and `require_tokenizer`.
    """
    checkpoint = open_checkpoint(
        choice.model,
        revision=choice.revision,
        tokenizer=choice.tokenizer,
        random_weights=choice.random_weights,
        adapter=None if choice.adapter is None else Path(choice.adapter),
        progress=progress,
    )
    if choice.tokenizer is None and choice.random_weights is None:
        checkpoint.tokenizer_path = require_tokenizer(checkpoint)
    return checkpoint


def existing_file(name: str, key: str, folder: Path, where: str) -> Path:
    """Find a file or folder that the plan names under `key`; `where` is the plan's own file.

    Raises:
        ElmExportError: it is not there.
    """
    path = _absolute(name, folder)
    if not path.exists():
        raise ElmExportError(f"{where}: {key} names {name}, and there is no {path}; paths in a plan are relative to the plan's folder")
    return path


def _path(name: str, folder: Path) -> str:
    """A name as the path that it is from the plan's folder, where something lies there; else the name."""
    path = _absolute(name, folder)
    return str(path) if path.exists() else name


def _absolute(name: str, folder: Path) -> Path:
    return (folder / Path(name).expanduser()).resolve()
