"""Checkpoint file of training code: the `.pt` file that CoreNet, Apple's training code, writes, with names of its own.

Only tensors are ever unpickled (`weights_only=True`): a file with code in it is refused. The file is mapped, not read, so tensors cost memory
only while they are in use. CoreNet's YAML configuration is not read: `config.json` beside the file, or the shapes, say which model it is.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmexport.checkpoint.base import Source
from elmexport.checkpoint.stored import StoredCheckpoint
from elmexport.errors import ElmExportError
from elmexport.models import families, find_family, read_config
from elmexport.models.base import Family, KnownModel, ModelConfig

if TYPE_CHECKING:
    import torch

_DTYPE_NAMES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


class CoreNetCheckpoint(StoredCheckpoint):
    """Tensors of one mapped `.pt` file, under the names of the family's published checkpoints."""

    def __init__(self, path: Path, tokenizer_path: Path | None = None) -> None:
        """Open `path`.

        Raises:
            ElmExportError: a file with code in it, damaged, holding no tensors, or of a model that is not known and has no config.json.
        """
        state = _load_state(path)
        config, known, family = _find_config(path, state)
        assert family.trained_name is not None
        self._tensors = {family.trained_name(name): tensor for name, tensor in state.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        dtypes = {
            name: _DTYPE_NAMES.get(str(tensor.dtype), str(tensor.dtype).removeprefix("torch.")) for name, tensor in self._tensors.items()
        }
        name = path.stem if known is None or known.config.dims.layers != config.dims.layers else known.name
        super().__init__(config, Source(name, "CoreNet checkpoint"), tokenizer_path, shapes, dtypes)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _find_config(path: Path, state: Mapping[str, torch.Tensor]) -> tuple[ModelConfig, KnownModel | None, Family]:
    """The configuration of the tensors `state`, the known model whose tensors they are (None where there is none), and their family."""
    beside = path.parent / "config.json"
    config = read_config(beside) if beside.is_file() else None
    candidates = [family for family in families() if family.trained_name is not None]
    if config is not None:
        family = find_family(config.model_type)
        if family.trained_name is None:
            raise ElmExportError(f"{path}: {family.name} models are not read from `.pt` files; give --model a folder with safetensors")
        candidates = [family]
    for family in candidates:
        assert family.trained_name is not None
        shapes = {family.trained_name(name): tuple(tensor.shape) for name, tensor in state.items()}
        known = next((model for model in family.known_models() if fits(model.config, shapes)), None)
        if config is not None:
            return config, known, family
        if known is not None:
            return known.config, known, family
    names = ", ".join(dict.fromkeys(model.name.removesuffix("-Instruct") for family in candidates for model in family.known_models()))
    raise ElmExportError(
        f"{path}: its tensors do not fit any known model ({names}); put the model's config.json (the fields of the published ones) beside the file"
    )


def fits(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensors in `shapes` are exactly those of `config`."""
    return {spec.name: spec.shape for spec in config.weights()} == dict(shapes)


def _load_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dictionary of a weights-only file, or of a training checkpoint (which keeps it under `model_state_dict`)."""
    import torch

    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ElmExportError(
                f"{path} holds Python code ({code[1]}) besides tensors; it was not run. elmexport opens `.pt` files with tensors only: "
                "use the weights-only file, or save the state dictionary by itself"
            ) from None
        raise ElmExportError(f"{path} is not a PyTorch checkpoint, or is damaged; download it again") from None
    except OSError as error:
        raise ElmExportError(f"{path} cannot be read ({error.strerror or error}); check the file and its permissions") from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ElmExportError(
            f"{path} is truncated or corrupt ({str(error).splitlines()[0] if str(error) else 'unexpected end'}); download it again"
        ) from None
    except Exception:  # bytes that are no pickle: the unpickler raises whatever they lead it to, KeyError, IndexError
        raise ElmExportError(f"{path} is not a PyTorch checkpoint, or is damaged; download it again") from None
    if isinstance(state, dict) and isinstance(state.get("model_state_dict"), dict):
        state = state["model_state_dict"]
    if not isinstance(state, dict) or not state:
        raise ElmExportError(
            f"{path} holds a {type(state).__name__}, not a state dictionary of named tensors; use a checkpoint that CoreNet wrote"
        )
    odd = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise ElmExportError(f"{path} holds entries that are not tensors: {', '.join(odd[:5])}; use a checkpoint that CoreNet wrote")
    return state
