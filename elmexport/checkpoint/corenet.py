"""A CoreNet checkpoint: the `.pt` file that Apple's training code writes, with CoreNet's key names.

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
from elmexport.models.openelm_config import OpenELMConfig
from elmexport.models.zoo import KnownModel, known_models

if TYPE_CHECKING:
    import torch

_DTYPE_NAMES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


class CoreNetCheckpoint(StoredCheckpoint):
    """Tensors of one mapped `.pt` file, under Apple's Hugging Face names."""

    def __init__(self, path: Path, tokenizer_path: Path | None = None) -> None:
        """Open `path`.

        Raises:
            ElmExportError: a file with code in it, damaged, holding no tensors, or of a model that is not known and has no config.json.
        """
        self._tensors = {apple_name(name): tensor for name, tensor in _load_state(path).items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        known = next((model for model in known_models() if fits(model.config, shapes)), None)
        config = _find_config(path, known)
        dtypes = {
            name: _DTYPE_NAMES.get(str(tensor.dtype), str(tensor.dtype).removeprefix("torch.")) for name, tensor in self._tensors.items()
        }
        name = path.stem if known is None or known.config.layers != config.layers else known.name
        super().__init__(config, Source(name, "CoreNet checkpoint"), tokenizer_path, shapes, dtypes)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def apple_name(name: str) -> str:
    """The Hugging Face name of a CoreNet tensor: `layers.0.ffn.proj_1.weight` is `transformer.layers.0.ffn.proj_1.weight` there.

    Source: the module names of CoreNet's `GeneralGPTModel`; its `classifier` is the Hugging Face model's `lm_head`. `module.` is what
    data-parallel training puts in front.
    """
    name = name.removeprefix("module.")
    return "lm_head.weight" if name == "classifier.weight" else f"transformer.{name}"


def fits(config: OpenELMConfig, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensors in `shapes` are exactly those of `config`."""
    return {spec.name: spec.shape for spec in config.weights()} == dict(shapes)


def _find_config(path: Path, known: KnownModel | None) -> OpenELMConfig:
    beside = path.parent / "config.json"
    if beside.is_file():
        return OpenELMConfig.from_file(beside)
    if known is not None:
        return known.config
    names = ", ".join(dict.fromkeys(model.name.removesuffix("-Instruct") for model in known_models()))
    raise ElmExportError(
        f"{path}: its tensors do not fit any known model ({names}); put the model's config.json (the fields of Apple's published ones) beside the file"
    )


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
            f"{path} holds a {type(state).__name__}, not a state dictionary of named tensors; use a CoreNet OpenELM checkpoint"
        )
    odd = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise ElmExportError(f"{path} holds entries that are not tensors: {', '.join(odd[:5])}; use a CoreNet OpenELM checkpoint")
    return state
