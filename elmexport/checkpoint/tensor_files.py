"""Contract of files with named tensors, whatever their format. The formats are `safetensors.py` and `pickled.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    import torch

FLOATS = ("BF16", "F16", "F32")  # dtypes that weights may have; safetensors' names
WHOLE_NUMBERS = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


@dataclass(frozen=True)
class TensorFacts:
    """Shape and dtype (safetensors' name: "BF16", "I64", "BOOL") of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str


class TensorFiles(ABC):
    """Tensors in one or more files, by the names that stand in them. Opening them reads headers only."""

    path: Path  # the file, or the folder of the files; for errors
    facts: Mapping[str, TensorFacts]

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored dtype."""


def refuse_pointer(path: Path) -> None:
    """Refuse a file that stands for the weights in a repository whose large files were not fetched.

    Raises:
        ElmExportError: it is one, and how to get the weights.
    """
    with path.open("rb") as raw:
        if raw.read(30).startswith(b"version https://git-lfs"):
            raise ElmExportError(f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull` in that folder")
