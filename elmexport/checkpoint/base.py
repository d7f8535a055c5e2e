"""Checkpoint contract: a configuration, tensors read one at a time, and where they came from.

What is not here: how each kind is found and opened (`elmexport.checkpoint.open_checkpoint`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.checkpoint.mismatch import Mismatch
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.progress import Progress
from elmexport.weights import Role, WeightSpec

if TYPE_CHECKING:
    import torch


WITH_ADAPTER = " with adapter "  # between a base's origin and an adapter's name


@dataclass(frozen=True)
class Source:
    """Origin of a checkpoint, for the manifest: never a path of this machine."""

    name: str  # display name, used in file names
    origin: str  # "embedded", "local folder", "hub:owner/name", "random weights, seed 0"
    revision: str | None = None  # the hub commit


class Checkpoint(ABC):
    """Weights of a model under the names of its family's published checkpoints, lazily readable.

    Opening one reads headers only; `tensor` reads one tensor and keeps nothing.
    """

    def __init__(self, config: ModelConfig, source: Source, tokenizer_path: Path | None = None) -> None:
        self.config = config
        self.source = source
        self.tokenizer_path = tokenizer_path  # tokenizer.json or tokenizer.model, None where there is none
        self.folder: Path | None = None  # of the model's files, None where it has none
        self.notes: list[str] = []  # what the user should know of how the files were read

    @cached_property
    def specs(self) -> dict[str, WeightSpec]:
        """Every tensor of the model by name, in forward order."""
        return {spec.name: spec for spec in self.config.weights()}

    @property
    def embedding_name(self) -> str:
        """The name of the token embedding's tensor."""
        return next(name for name, spec in self.specs.items() if spec.role is Role.EMBEDDING)

    @abstractmethod
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the checkpoint holds, without reading any."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype (bfloat16, float16 or float32)."""

    @abstractmethod
    def identity(self, progress: Progress | None = None) -> str:
        """SHA-256 (hex) that two checkpoints share only if their configuration and weights are the same bytes.

        Reads every weight, the first time; `progress` receives that as a stage.
        """

    def stored_name(self, name: str) -> str:
        """Name of the tensor `name` in the checkpoint's own files, for messages."""
        return name

    def check(self) -> None:
        """Compare names and shapes with what the configuration calls for.

        Raises:
            ElmExportError: missing or extra tensors, or a shape that contradicts the configuration; the first few are named, with the likely cause.
        """
        problems = self.mismatch().sentence()
        if problems is not None:
            raise ElmExportError(f"the weights of {self.source.name} do not fit its config.json; {problems}")

    def mismatch(self) -> Mismatch:
        """Compare the tensors that are there with those of the configuration, for `check`."""
        shapes = self.stored_shapes()
        return Mismatch(self.config, self.specs, shapes, [name for name in shapes if name not in self.specs], {})

    def tensor(self, name: str) -> torch.Tensor:
        """`read`, refusing values that no export can hold.

        Raises:
            ElmExportError: the tensor holds NaN or infinity.
        """
        import torch

        tensor = self.read(name)
        # The extremes carry NaN and infinity, and finding them copies nothing; the elementwise test, which does, only words the error.
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ElmExportError(
                f"{self.stored_name(name)} holds {bad} values that are NaN or infinite, of {tensor.numel()}; the checkpoint is damaged, download or save it again"
            )
        return tensor
