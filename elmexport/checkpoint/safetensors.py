"""Weights in safetensors: `model.safetensors`, or shards with `model.safetensors.index.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.checkpoint.tensor_files import TensorFacts, TensorFiles, refuse_pointer
from elmexport.documents import decode_json
from elmexport.errors import ElmExportError, listed

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFiles(TensorFiles):
    """Tensors in safetensors files, mapped one at a time."""

    def __init__(self, folder: Path, single: str = SINGLE, index: str = INDEX) -> None:
        """Read the headers of the files in `folder`: of `single` where it is there, else of those that `index` names.

        Raises:
            ElmExportError: no weights in the folder, a truncated or corrupt file, a missing shard, or an index that names absent tensors.
        """
        self.path = folder
        self._files: dict[str, Path] = {}
        facts: dict[str, TensorFacts] = {}
        for path in weight_files(folder, single, index):
            for name, found in _read_header(path).items():
                self._files[name], facts[name] = path, found
        check_index(folder, single, index, facts)
        self.facts = facts

    def read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        # Opened anew for each tensor: the mapping goes when the tensor does, so memory in use stays at one tensor, not one file.
        with safe_open(self._files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def weight_files(folder: Path, single: str, index: str) -> list[Path]:
    """The file `single` of `folder`, or the files that its `index` (a JSON file with a `weight_map`) names.

    Raises:
        ElmExportError: neither is there, a file that the index names is missing, or the index is damaged.
    """
    return [folder / single] if (folder / single).is_file() else _shards(folder, index, _read_index(folder, single, index))


def check_index(folder: Path, single: str, index: str, found: Mapping[str, object]) -> None:
    """Refuse an index that lists tensors that are not among those `found` in its files.

    Raises:
        ElmExportError: which ones.
    """
    if (folder / single).is_file():
        return
    absent = [name for name in _read_index(folder, single, index) if name not in found]
    if absent:
        raise ElmExportError(
            f"{folder / index} lists tensors that its files do not hold: {listed(absent)}; download or save the checkpoint again"
        )


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds safetensors under the names that we read."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _read_header(path: Path) -> dict[str, TensorFacts]:
    """Shape and dtype of every tensor of one file. Reads no tensor, and imports no torch."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {name: TensorFacts(tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()}
    except SafetensorError as error:
        refuse_pointer(path)
        raise ElmExportError(f"{path} is truncated or corrupt ({error}); download or save it again") from None
    except OSError as error:
        raise ElmExportError(f"{path} cannot be read ({error.strerror or error}); check the file and its permissions") from None


def _read_index(folder: Path, single: str, index: str) -> dict[str, str]:
    """The index's map from tensor name to file name."""
    path = folder / index
    try:
        weight_map = decode_json(path.read_bytes())["weight_map"]
    except FileNotFoundError:
        raise ElmExportError(
            f"{folder} holds neither {single} nor {index}; a checkpoint folder holds config.json and one of them"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ElmExportError(f"{path} is not an index of weights (a JSON object with a weight_map); download it again") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
        raise ElmExportError(f"{path}: weight_map must map tensor names to names of files in the same folder; download it again")
    return weight_map


def _shards(folder: Path, index: str, weight_map: Mapping[str, str]) -> list[Path]:
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ElmExportError(
            f"{folder} lacks {listed(missing)}, of the {len(files)} files that {index} names; download the missing files into the folder"
        )
    return [folder / file for file in files]
