"""Checkpoint folder in Hugging Face's layout: `config.json` with `model.safetensors`, or with shards and their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.checkpoint.base import Source
from elmexport.checkpoint.stored import StoredCheckpoint
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsCheckpoint(StoredCheckpoint):
    """Tensors in one or more safetensors files, mapped one at a time."""

    def __init__(self, folder: Path, config: ModelConfig, source: Source, tokenizer_path: Path | None = None) -> None:
        """Read the headers of the files in `folder`.

        Raises:
            ElmExportError: no weights in the folder, a truncated or corrupt file, a missing shard, an index that names absent tensors,
                or a dtype that cannot be exported.
        """
        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        index = None if (folder / SINGLE).is_file() else _read_index(folder)
        for path in [folder / SINGLE] if index is None else _shards(folder, index):
            for name, (shape, dtype) in _read_header(path).items():
                self._files[name], shapes[name], dtypes[name] = path, shape, dtype
        absent = [name for name in index or {} if name not in shapes]
        if absent:
            raise ElmExportError(
                f"{folder / INDEX} lists tensors that its files do not hold: {', '.join(absent)}; download or save the checkpoint again"
            )
        super().__init__(config, source, tokenizer_path, shapes, dtypes)

    def read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        # Opened anew for each tensor: the mapping goes when the tensor does, so memory in use stays at one tensor, not one file.
        with safe_open(self._files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds safetensors under the names that we read."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of one file. Reads no tensor, and imports no torch."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()}
    except SafetensorError as error:
        with path.open("rb") as raw:
            if raw.read(30).startswith(b"version https://git-lfs"):
                raise ElmExportError(
                    f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull` in that folder"
                ) from None
        raise ElmExportError(f"{path} is truncated or corrupt ({error}); download or save it again") from None
    except OSError as error:
        raise ElmExportError(f"{path} cannot be read ({error.strerror or error}); check the file and its permissions") from None


def _read_index(folder: Path) -> dict[str, str]:
    """The index's map from tensor name to file name."""
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        raise ElmExportError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; a checkpoint folder holds config.json and one of them"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise ElmExportError(f"{path} is not a safetensors index (a JSON object with a weight_map); download it again") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
        raise ElmExportError(f"{path}: weight_map must map tensor names to names of files in the same folder; download it again")
    return weight_map


def _shards(folder: Path, index: dict[str, str]) -> list[Path]:
    files = sorted(set(index.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ElmExportError(
            f"{folder} lacks {', '.join(missing)}, of the {len(files)} files that {INDEX} names; download the missing files into the folder"
        )
    return [folder / file for file in files]
