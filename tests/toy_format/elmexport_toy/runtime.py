"""Runs the format in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.errors import ElmExportError
from elmexport.models import read_config
from elmexport.runtimes.torch import TorchRuntime
from elmexport_toy.target import FILE


class ToyWeights(Checkpoint):
    """The weights in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(read_config(path.with_name("config.json")), Source(path.stem, "a toy"))
        try:
            with np.load(path) as file:
                self._arrays = dict(file)
        except (OSError, ValueError) as error:
            raise ElmExportError(f"{path} cannot be read ({error}); export it again") from None
        self.context = int(self._arrays.pop("context"))

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self._arrays.items()}

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays[name])

    def identity(self) -> str:
        raise NotImplementedError("of an artifact nobody asks")


class ToyRuntime(TorchRuntime):
    """A file in memory."""

    name = "toy engine"


def open_runtime(path: Path) -> ToyRuntime:
    """Open an artifact folder, or the file in it."""
    weights = ToyWeights(path / FILE if path.is_dir() else path)
    weights.check()
    return ToyRuntime(weights, context=weights.context)
