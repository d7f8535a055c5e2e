"""Weights in files that `torch.save` wrote: `pytorch_model.bin`, alone or in shards, and the `.pt` files of training code.

Only tensors are ever unpickled (`weights_only=True`): a file with code in it is refused. Files are mapped, not read, so tensors cost memory
only while they are in use; before the first one is, the file's checksums are compared.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmexport.checkpoint.archive import check_archive, check_content
from elmexport.checkpoint.safetensors import check_index, weight_files
from elmexport.checkpoint.tensor_files import TensorFacts, TensorFiles, refuse_pointer
from elmexport.errors import ElmExportError, listed

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SUFFIXES = (".pt", ".pth", ".bin")

# What trainers write beside a model: states of optimizers, schedulers, scalers and random generators, and arguments.
_TRAINERS = re.compile(r"(optimizer|scheduler|scaler|random_states|rng_state|training_args|trainer_state)([_.-].*)?\.(pt|pth|bin|pkl)")
_NESTED = ("model_state_dict", "state_dict", "model")  # keys under which training checkpoints keep the model
_DTYPE_NAMES = {
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.bool": "BOOL",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
}


class PickledFiles(TensorFiles):
    """Tensors of mapped files."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        """Open `files`; errors about all of them name `path`.

        Raises:
            ElmExportError: a file with code in it, a damaged one, or one that holds something else than a model.
        """
        self.path = path
        self._unread = [file for file in files if zipfile.is_zipfile(file)]  # archives whose content nobody has compared with its checksums
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            self._tensors |= _load_state(file)
        self.facts = {
            name: TensorFacts(tuple(tensor.shape), _DTYPE_NAMES.get(str(tensor.dtype), str(tensor.dtype).removeprefix("torch.")))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Give the mapped tensor.

        Raises:
            ElmExportError: the file's content is not what its checksums say; the first tensor that is read finds out.
        """
        while self._unread:
            check_content(self._unread[-1])
            self._unread.pop()
        return self._tensors[name]


def open_file(path: Path) -> PickledFiles:
    """Open one file.

    Raises:
        ElmExportError: see `PickledFiles`, or a file of a trainer's that is no model.
    """
    if is_trainers(path):
        raise ElmExportError(_not_a_model(path))
    return PickledFiles(path, [path])


def open_bin(folder: Path) -> PickledFiles:
    """Open `pytorch_model.bin` of `folder`, or the shards that its index names.

    Raises:
        ElmExportError: see `PickledFiles` and `weight_files`.
    """
    files = PickledFiles(folder, weight_files(folder, SINGLE, INDEX))
    check_index(folder, SINGLE, INDEX, files.facts)
    return files


def has_bin(folder: Path) -> bool:
    """Whether `folder` holds `pytorch_model.bin` or its index."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def is_trainers(path: Path) -> bool:
    """Whether `path` has the name of a file that trainers write beside a model."""
    return _TRAINERS.fullmatch(path.name) is not None


def _not_a_model(path: Path) -> str:
    return f"{path} is a trainer's own state (of an optimizer, a scheduler, a random generator, or its arguments), not a model; give --model the folder or file that holds the weights"


def _load_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dictionary of a weights-only file, or of a training checkpoint that has one among other things."""
    import torch

    state = _load(path)
    nested = next((state[key] for key in _NESTED if isinstance(state, dict) and isinstance(state.get(key), Mapping)), None)
    if nested is not None:
        state = dict(nested)
    if isinstance(state, dict) and {"state", "param_groups"} <= state.keys():
        raise ElmExportError(_not_a_model(path))
    if not isinstance(state, dict) or not state:
        raise ElmExportError(
            f"{path} holds a {type(state).__name__}, not a state dictionary of named tensors; give --model a file that holds the weights"
        )
    odd = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if len(odd) == len(state):
        raise ElmExportError(f"{path} holds no tensors ({listed(odd)}), so it is no model; give --model a file that holds the weights")
    if odd:
        raise ElmExportError(f"{path} holds entries that are not tensors: {listed(odd)}; save the state dictionary of the model by itself")
    return {str(name): value for name, value in state.items()}


def _load(path: Path) -> Any:
    import torch

    archive = zipfile.is_zipfile(path)
    if archive:
        check_archive(path)
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ElmExportError(
                f"{path} holds Python code ({code[1][:80]}) besides tensors; it was not run. elmexport opens files with tensors only: "
                "use the weights-only file, or save the state dictionary by itself"
            ) from None
        refuse_pointer(path)
        raise ElmExportError(f"{path} is not a PyTorch checkpoint, or is damaged; download it again") from None
    except OSError as error:
        raise ElmExportError(f"{path} cannot be read ({error.strerror or error}); check the file and its permissions") from None
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else "unexpected end"
        raise ElmExportError(f"{path} is truncated or corrupt ({reason}); download it again") from None
    except Exception:  # bytes that are no pickle: the unpickler raises whatever they lead it to, KeyError, IndexError
        raise ElmExportError(f"{path} is not a PyTorch checkpoint, or is damaged; download it again") from None
