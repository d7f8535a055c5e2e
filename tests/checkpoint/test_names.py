"""What people's tools do to names: wrappers' prefixes, folders with spaces, snapshots in the hub's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Source
from elmexport.checkpoint.names import display_name, find_name, snapshot_repo
from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.models.openelm.names import from_corenet

Tensors = dict[str, torch.Tensor]
QKV = "transformer.layers.0.attn.qkv_proj.weight"


@pytest.fixture
def tensors(small_config: OpenELMConfig) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in small_config.weights()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "base_model.model.", "_orig_mod.module.", "model._orig_mod.module."])
def test_prefixes_of_wrappers(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors, prefix: str) -> None:
    save_checkpoint(tmp_path / "plain", small_config, tensors)
    save_checkpoint(tmp_path / "wrapped", small_config, {prefix + name: tensor for name, tensor in tensors.items()})
    plain, wrapped = (open_checkpoint(str(tmp_path / name), tokenizer="none") for name in ("plain", "wrapped"))
    assert wrapped.identity() == plain.identity() and plain.notes == []
    assert wrapped.notes == [f"tensor names begin with {prefix!r} (wrapped), which was left out"]
    assert wrapped.stored_name(QKV) == prefix + QKV


def test_errors_speak_of_the_names_in_the_file(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    tensors[QKV][0, 0] = float("nan")
    save_checkpoint(tmp_path / "m", small_config, {f"module.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(ElmExportError, match=rf"^module\.{QKV} holds 1 values that are NaN"):
        open_checkpoint(str(tmp_path / "m"), tokenizer="none").tensor(QKV)


def test_names_of_modules_that_were_wrapped_one_by_one() -> None:
    name = "transformer.layers.0._orig_mod.attn._fsdp_wrapped_module.qkv_proj.weight"
    assert find_name(name, {QKV}, from_corenet) == (QKV, "")
    assert find_name("module.layers.0.attn.qkv_proj.weight", {QKV}, from_corenet) == (QKV, "module.")
    assert find_name("layers.0.attn.qkv_proj.weight", {QKV}, None) is None


def test_a_family_whose_own_names_begin_like_a_wrapper() -> None:
    assert find_name("model.norm.weight", {"model.norm.weight"}, None) == ("model.norm.weight", "")
    assert find_name("base_model.model.model.norm.weight", {"model.norm.weight"}, None) == ("model.norm.weight", "base_model.model.")


def test_the_same_tensor_twice(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, small_config, tensors | {f"module.{QKV}": tensors[QKV].clone()})
    with pytest.raises(ElmExportError, match=rf"holds tensors twice: .*{QKV} and .*{QKV}; save the model's own state dictionary"):
        open_checkpoint(str(tmp_path), tokenizer="none")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my model (v2)", "my-model-v2"),
        ("checkpoint-1000", "checkpoint-1000"),
        ("..hidden", "hidden"),
        ("Äpfel ÿ", "Äpfel-ÿ"),
        (" ", "model"),
    ],
)
def test_names_for_files(tmp_path: Path, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir()
    assert display_name(tmp_path / folder) == name


def test_a_file_goes_by_its_name_without_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "my run.v1.pt").touch()
    assert display_name(tmp_path / "my run.v1.pt") == "my-run.v1"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """As huggingface_hub lays it out: links into a folder of blobs, which nobody may write to."""
    repo = tmp_path / "hub" / "models--apple--OpenELM-mine"
    blobs, folder = repo / "blobs", repo / "snapshots" / ("0123456789" * 4)
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors", "tokenizer.model")):
        shutil.copy(TINY_FOLDER / name, blobs / f"{number:064}")
        (folder / name).symlink_to(os.path.relpath(blobs / f"{number:064}", folder))
    for path in (blobs, folder):
        path.chmod(0o555)
    return folder


def test_a_snapshot_in_the_cache_goes_by_its_repository(snapshot: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(snapshot))
    assert checkpoint.source == Source("OpenELM-mine", "hub:apple/OpenELM-mine", "0123456789" * 4)
    assert checkpoint.tokenizer_path == snapshot / "tokenizer.model"
    assert checkpoint.identity() == open_checkpoint("tiny").identity()
    assert snapshot_repo(snapshot.parent) is None and snapshot_repo(tmp_path) is None
    (tmp_path / "mine").symlink_to(snapshot)
    assert open_checkpoint(str(tmp_path / "mine")).source.name == "mine"  # what the user gave


def test_corenet_names_in_safetensors(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, small_config, {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    assert torch.equal(open_checkpoint(str(tmp_path), tokenizer="none").tensor(QKV), tensors[QKV])


@pytest.mark.slow
def test_names_reach_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elmexport.exporting import export

    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_FOLDER, tmp_path / "my model")
    stored = load_file(tmp_path / "my model" / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in stored.items()}, tmp_path / "my model" / "model.safetensors")
    for target, suffix in (("gguf", ".gguf"), ("coreml", ".mlpackage"), ("onnx", ".onnx")):
        result = export("my model", target, "fp16", verify=False)
        assert result.path == Path(f"my-model-{target}-fp16") and result.manifest.model.name == "my-model"
        assert result.notes[0] == "tensor names begin with 'module.' (my model), which was left out"
        assert [path for path in result.path.rglob("*") if path.suffix == suffix and " " not in path.name]
