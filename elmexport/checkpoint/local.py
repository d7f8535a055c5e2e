"""Checkpoints and adapters on this machine: which of a folder's files hold the weights, and what they are called."""

from __future__ import annotations

import os
from pathlib import Path

from elmexport.checkpoint import pickled
from elmexport.checkpoint.adapter import AdaptedCheckpoint, read_adapter, split
from elmexport.checkpoint.adapter_config import CONFIG, adapter_base
from elmexport.checkpoint.base import WITH_ADAPTER, Checkpoint, Source
from elmexport.checkpoint.corenet import find_config
from elmexport.checkpoint.names import display_name, snapshot_repo
from elmexport.checkpoint.safetensors import SafetensorsFiles, has_weights
from elmexport.checkpoint.stored import StoredCheckpoint
from elmexport.checkpoint.tensor_files import TensorFiles
from elmexport.errors import ElmExportError, listed
from elmexport.models import read_config
from elmexport.models.base import ModelConfig

ADAPTER_SAFETENSORS, ADAPTER_BIN = "adapter_model.safetensors", "adapter_model.bin"


def holds_checkpoint(path: Path) -> bool:
    """Whether the folder `path` looks like a checkpoint or an adapter, so that it is what a name means."""
    return os.path.isdir(path) and (
        (path / "config.json").is_file() or (path / CONFIG).is_file() or has_weights(path) or pickled.has_bin(path) or bool(_pt_files(path))
    )


def open_path(path: Path, tokenizer_path: Path | None) -> Checkpoint:
    """Open the checkpoint in the folder or file `path`.

    Raises:
        ElmExportError: no weights there, several that could be meant, an adapter without its base, or unusable files.
    """
    if path.is_file():
        return _open_pt(path, tokenizer_path)
    if has_weights(path) or pickled.has_bin(path):
        config = read_config(path / "config.json")
        checkpoint = open_folder(path, config, _source(path), tokenizer_path)
        if any((path / name).is_file() for name in (ADAPTER_SAFETENSORS, ADAPTER_BIN)):
            checkpoint.notes.append(f"{path.name} holds an adapter too, which was left out; pass --adapter {path} to merge it")
        return checkpoint
    found = _pt_files(path)
    if (path / CONFIG).is_file() and not found:
        raise ElmExportError(_needs_base(path))
    if len(found) == 1:
        return _open_pt(found[0], tokenizer_path)
    if found:
        raise ElmExportError(f"{path} holds {len(found)} .pt files ({listed([file.name for file in found])}); give --model one of them")
    read_config(path / "config.json")
    raise ElmExportError(_no_weights(path))


def open_folder(folder: Path, config: ModelConfig, source: Source, tokenizer_path: Path | None) -> Checkpoint:
    """Open the weights in `folder` in Hugging Face's layout: safetensors if there are any, else `pytorch_model.bin`.

    Raises:
        ElmExportError: unusable files.
    """
    files: TensorFiles = SafetensorsFiles(folder) if has_weights(folder) or not pickled.has_bin(folder) else pickled.open_bin(folder)
    return _open_tensors(files, folder, config, source, tokenizer_path)


def open_adapter(path: Path, base: Checkpoint) -> AdaptedCheckpoint:
    """Merge the adapter in the folder or file `path` into `base`.

    Raises:
        ElmExportError: no adapter there, one of another model, or see `read_adapter`.
    """
    files = _adapter_files(path)
    _, adapter = split(files)
    if adapter is not None and any(".base_layer." in name for name in files.facts):
        raise ElmExportError(f"{path} holds the adapter and its base in one; give it with --model, without --adapter")
    if adapter is None and not (path / CONFIG).is_file():
        raise ElmExportError(f"--adapter {path}: {files.path.name} holds no LoRA tensors; give an adapter as PEFT or CoreNet writes it")
    name = display_name(path)
    read = read_adapter(name, files, path if path.is_dir() else path.parent, base.config)
    source = Source(f"{base.source.name}-{name}", f"{base.source.origin}{WITH_ADAPTER}{name}", base.source.revision)
    return AdaptedCheckpoint(base, read, source)


def _open_pt(path: Path, tokenizer_path: Path | None) -> Checkpoint:
    if path.suffix == ".bin" and not pickled.is_trainers(path):
        raise ElmExportError(f"give --model the folder that holds {path.name} ({path.parent}), not the file")
    if path.suffix not in pickled.SUFFIXES:
        if path.name == ADAPTER_SAFETENSORS:
            raise ElmExportError(_needs_base(path.parent))
        raise ElmExportError(f"{path} is a file of another kind; give --model the folder that holds it, or a CoreNet .pt file")
    files = pickled.open_file(path)
    own, adapter = split(files)
    if adapter is not None and not any(".base_layer." in name for name in files.facts):
        raise ElmExportError(_needs_base(path))
    config = find_config(path, {name: facts.shape for name, facts in own.facts.items()})
    return _open_tensors(files, path.parent, config, Source(display_name(path), "CoreNet checkpoint"), tokenizer_path)


def _open_tensors(files: TensorFiles, folder: Path, config: ModelConfig, source: Source, tokenizer_path: Path | None) -> Checkpoint:
    """The checkpoint in `files`, merged with the adapter that training code stored with it, where there is one."""
    own, adapter = split(files)
    if adapter is not None and not own.facts:
        raise ElmExportError(_needs_base(files.path))
    checkpoint = StoredCheckpoint(own, config, source, tokenizer_path)
    checkpoint.folder = folder
    if adapter is None:
        return checkpoint
    checkpoint.check()
    return AdaptedCheckpoint(checkpoint, read_adapter("stored with it", adapter, folder, checkpoint.config), source)


def _source(path: Path) -> Source:
    repo = snapshot_repo(path)
    if repo is None:
        return Source(display_name(path), "local folder")
    return Source(display_name(path), f"hub:{repo}", path.absolute().name)


def _pt_files(folder: Path) -> list[Path]:
    """The `.pt` files of `folder` that could be models, by name alone."""
    return sorted(path for path in folder.glob("*.pt") if not pickled.is_trainers(path))


def _adapter_files(path: Path) -> TensorFiles:
    if path.is_file():
        if path.suffix in pickled.SUFFIXES:
            return pickled.open_file(path)
        if path.suffix == ".safetensors":
            return SafetensorsFiles(path.parent, path.name)
        raise ElmExportError(f"--adapter {path}: a file of another kind; give the folder that holds the adapter, or a .pt file")
    if not path.is_dir():
        raise ElmExportError(f"--adapter {path}: no such file or folder; give the folder of an adapter, as PEFT or CoreNet writes it")
    if (path / ADAPTER_SAFETENSORS).is_file():
        return SafetensorsFiles(path, ADAPTER_SAFETENSORS)
    if (path / ADAPTER_BIN).is_file():
        return pickled.open_file(path / ADAPTER_BIN)
    found = _pt_files(path)
    if len(found) == 1:
        return pickled.open_file(found[0])
    raise ElmExportError(
        f"--adapter {path}: holds neither {ADAPTER_SAFETENSORS} nor {ADAPTER_BIN} nor one .pt file ({len(found)} found); "
        "give the folder of an adapter, as PEFT or CoreNet writes it"
    )


def _needs_base(path: Path) -> str:
    base = adapter_base(path if path.is_dir() else path.parent)
    given = f"--model {base} " if base else "--model BASE "
    return f"{path} is an adapter, not a model: give its base with --model, and this with --adapter ({given}--adapter {path})"


def _no_weights(folder: Path) -> str:
    trainers = sorted(path.name for path in folder.iterdir() if pickled.is_trainers(path))
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf", ".pth") and path.name not in trainers
    )
    hint = ""
    if (folder / "weights.safetensors").is_file():
        hint = " It looks like a conversion to MLX; give the checkpoint that it was made from."
    elif others:
        hint = f" Of other names it holds {listed(others)}."
    elif trainers:
        hint = f" It holds a trainer's own state only ({listed(trainers)})."
    return (
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json, nor pytorch_model.bin; "
        f"a checkpoint folder holds config.json and one of them.{hint}"
    )
