"""`pytorch_model.bin`, alone and in shards, and what trainers write beside models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.pickled import is_trainers
from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.models.openelm.config import OpenELMConfig

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors(small_config: OpenELMConfig) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in small_config.weights()}


def write(folder: Path, config: OpenELMConfig, tensors: Tensors, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name].clone() for name in list(tensors)[shard::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refused(path: Path, message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        open_checkpoint(str(path), tokenizer="none")


def leave_trainers_files(folder: Path, tensors: Tensors) -> None:
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in list(tensors.values())[:2]]
    optimizer = torch.optim.AdamW(parameters)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0).state_dict(), folder / "scheduler.pt")
    torch.save({"_scale": 1.0}, folder / "scaler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state_0.pth")
    torch.save({"args": 1}, folder / "training_args.bin")


@pytest.mark.parametrize("shards", [1, 3])
def test_equals_the_safetensors_checkpoint(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors, shards: int) -> None:
    save_checkpoint(tmp_path / "safe", small_config, tensors)
    found = open_checkpoint(str(write(tmp_path / "bin", small_config, tensors, shards)), tokenizer="none")
    assert found.identity() == open_checkpoint(str(tmp_path / "safe"), tokenizer="none").identity()
    assert (found.source.name, found.source.origin, found.notes) == ("bin", "local folder", [])


def test_safetensors_go_first(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    write(tmp_path, small_config, {name: tensor + 1 for name, tensor in tensors.items()})
    save_checkpoint(tmp_path, small_config, tensors)
    name = "transformer.norm.weight"
    assert torch.equal(open_checkpoint(str(tmp_path), tokenizer="none").tensor(name), tensors[name])


def test_a_trainers_folder(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    folder = write(tmp_path / "checkpoint-1000", small_config, tensors)
    leave_trainers_files(folder, tensors)
    assert open_checkpoint(str(folder), tokenizer="none").source.name == "checkpoint-1000"
    (folder / "pytorch_model.bin").rename(folder / "model.pt")
    assert open_checkpoint(str(folder), tokenizer="none").source.name == "model"  # the only .pt that is none of the trainer's
    (folder / "model.pt").unlink()
    refused(folder, r"holds neither model.safetensors .* nor pytorch_model.bin; .* It holds a trainer's own state only \(.*optimizer.pt")


def test_trainers_files_are_named_for_what_they_are(tmp_path: Path, tensors: Tensors) -> None:
    leave_trainers_files(tmp_path, tensors)
    for path in tmp_path.iterdir():
        assert is_trainers(path)
        refused(path, f"{path.name} is a trainer's own state .*, not a model; give --model the folder or file that holds the weights")
    (tmp_path / "optimizer.pt").rename(tmp_path / "last.pt")  # by what it holds, where the name does not tell
    refused(tmp_path / "last.pt", r"last.pt is a trainer's own state")
    (tmp_path / "scheduler.pt").rename(tmp_path / "other.pt")
    refused(tmp_path / "other.pt", r"other.pt holds no tensors \(.* and \d+ more\), so it is no model")


def test_the_file_instead_of_the_folder(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    refused(
        write(tmp_path, small_config, tensors) / "pytorch_model.bin",
        f"give --model the folder that holds pytorch_model.bin \\({tmp_path}\\)",
    )


def test_code_is_not_run(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    marker = tmp_path / "ran"

    class Exploit:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(marker)!r}, 'w')",)

    state: dict[str, Any] = dict(tensors)
    write(tmp_path, small_config, state | {"extra": Exploit()})
    refused(tmp_path, r"pytorch_model.bin holds Python code \(.*exec\) besides tensors; it was not run")
    assert not marker.exists()


def test_a_shard_that_is_missing(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    folder = write(tmp_path, small_config, tensors, 3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    refused(folder, "lacks pytorch_model-00002-of-00003.bin, of the 3 files that pytorch_model.bin.index.json names")


def test_a_pointer_instead_of_the_file(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    path = write(tmp_path, small_config, tensors) / "pytorch_model.bin"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(tmp_path, "pytorch_model.bin is a Git LFS pointer, not the weights themselves")
