"""Checkpoint contract: a configuration, tensors read one at a time, and where they came from.

What is not here: how each kind is found and opened (`elmexport.checkpoint.open_checkpoint`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.weights import WeightSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from, for the manifest: never a path of this machine."""

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
        self.tokenizer_path = tokenizer_path  # tokenizer.model or tokenizer.json, None where there is none

    @cached_property
    def specs(self) -> dict[str, WeightSpec]:
        """Every tensor of the model by name, in forward order."""
        return {spec.name: spec for spec in self.config.weights()}

    @abstractmethod
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the checkpoint holds, without reading any."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype (bfloat16, float16 or float32)."""

    @abstractmethod
    def identity(self) -> str:
        """SHA-256 (hex) that two checkpoints share only if their configuration and weights are the same bytes."""

    def check(self) -> None:
        """Compare names and shapes with what the configuration calls for.

        Raises:
            ElmExportError: missing or extra tensors, or a shape that contradicts the configuration; every offender is named.
        """
        stored = self.stored_shapes()
        missing = [name for name in self.specs if name not in stored]
        extra = [name for name in stored if name not in self.specs]
        wrong = [
            f"{name} is {list(stored[name])}, config.json calls for {list(spec.shape)}"
            for name, spec in self.specs.items()
            if name in stored and stored[name] != spec.shape
        ]
        problems = [
            f"{label}: {', '.join(names)}"
            for label, names in (("missing tensors", missing), ("extra tensors", extra), ("wrong shapes", wrong))
            if names
        ]
        if problems:
            raise ElmExportError(
                f"the weights of {self.source.name} do not fit its config.json; "
                + "; ".join(problems)
                + ". Use the config.json that belongs to these weights"
            )

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
                f"{name} holds {bad} values that are NaN or infinite, of {tensor.numel()}; the checkpoint is damaged, download or save it again"
            )
        return tensor
