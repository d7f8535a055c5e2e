"""How artifacts and their references are described and found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from elmexport.artifact import MANIFEST
from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.random import RandomCheckpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.evaluation.evaluated_model import evaluated_artifact, find_reference
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.runtimes.torch import TorchRuntime
from tests.conftest import ExportTo, MadeOnce, SmallArtifact
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.reference import reference_logits


def edited(artifact: Path, folder: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of `artifact` whose manifest went through `edit`."""
    copy = folder / artifact.name
    shutil.copytree(artifact, copy)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    edit(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return copy


def saved(checkpoint: Checkpoint, folder: Path) -> None:
    save_checkpoint(folder, checkpoint.config, {name: checkpoint.read(name) for name in checkpoint.specs})


@pytest.mark.slow
@pytest.mark.parametrize(("target", "quant"), [("onnx", "int8"), ("coreml", "int8"), ("gguf", "q8_0")])
def test_an_artifact_is_described_by_its_manifest_and_files(target: str, quant: str, small_artifact: SmallArtifact) -> None:
    path = small_artifact(target, quant)
    evaluated = evaluated_artifact(path)
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    subject = evaluated.subject
    assert (subject.label, subject.target, subject.quant) == (path.name, target, manifest["quant"]["name"])
    assert subject.bits_per_weight == manifest["bits_per_weight"] and subject.words == manifest["quant"]["words"]
    assert subject.bytes == sum(
        facts["bytes"] for name, facts in manifest["files"].items() if name != "README.md"
    )  # the card may be edited
    assert subject.model.identity == manifest["model"]["identity"]
    runtime = evaluated.open_runtime()
    assert runtime.name == subject.engine
    runtime.close()


def test_identity_follows_the_files_not_the_place(small_artifact: SmallArtifact, tmp_path: Path) -> None:
    path = small_artifact("onnx", "int8")
    moved = tmp_path / "elsewhere"
    shutil.copytree(path, moved)
    assert evaluated_artifact(moved).subject.identity == evaluated_artifact(path).subject.identity
    data = next(moved.glob("onnx/*data*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert evaluated_artifact(moved).subject.identity != evaluated_artifact(path).subject.identity


def test_a_bare_file_is_described_with_its_data(small_artifact: SmallArtifact) -> None:
    (model,) = small_artifact("onnx", "int8").glob("onnx/*.onnx")
    subject = evaluated_artifact(model).subject
    assert subject.label == model.name and subject.model.identity is None and subject.bits_per_weight is None
    assert subject.bytes == sum(file.stat().st_size for file in model.parent.iterdir())


@pytest.mark.slow
def test_the_reference_of_the_embedded_model(tiny: Checkpoint, export_to: ExportTo) -> None:
    path = export_to(tiny, "onnx", "int8", context=64)
    reference = find_reference(path)
    assert reference.subject.model.identity == tiny.identity()
    assert reference.subject.label == "OpenELM-tiny fp16" and reference.subject.bits_per_weight == 16
    runtime = reference.open_runtime()
    assert runtime.context == 64
    ids = np.arange(1, 30)
    halved = {name: tiny.read(name).to(torch.float16).double().numpy() for name in tiny.specs}
    np.testing.assert_allclose(runtime.logits(ids), reference_logits(tiny.config, halved, ids), atol=2e-4)


def test_the_reference_of_random_weights(small_config: OpenELMConfig, export_to: ExportTo) -> None:
    checkpoint = RandomCheckpoint(small_config, "small", 7)
    path = export_to(checkpoint, "onnx", "fp32")
    reference = find_reference(path)
    assert reference.subject.model.identity == checkpoint.identity()
    assert reference.subject.model.name == "small-random7"


def test_a_local_model_is_given_with_against(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path) -> None:
    folder = tmp_path / "own-model"
    saved(small_checkpoint, folder)
    path = export_to(open_checkpoint(str(folder), tokenizer="none"), "onnx", "fp32")
    with pytest.raises(ElmExportError, match=r"own-model, a local folder, whose place .* pass --against PATH"):
        find_reference(path)
    assert find_reference(path, str(folder)).subject.model.name == "own-model"
    other = tmp_path / "other"
    saved(random_checkpoint(small_checkpoint.config, seed=5), other)
    with pytest.raises(ElmExportError, match="not the same weights"):
        find_reference(path, str(other))
    assert find_reference(folder).subject.quant == "fp16 reference"  # of a checkpoint: itself
    with pytest.raises(ElmExportError, match="not the same weights"):
        find_reference(folder, str(other))


@pytest.mark.slow
def test_another_artifact_as_reference(small_artifact: SmallArtifact, tiny_artifact: MadeOnce) -> None:
    path = small_artifact("onnx", "int8")
    reference = find_reference(path, str(small_artifact("onnx", "fp32")))
    assert reference.subject.quant == "fp32"
    with pytest.raises(ElmExportError, match="not the same weights"):
        find_reference(path, str(tiny_artifact("onnx", "int8")))
    (model,) = path.glob("onnx/*.onnx")
    with pytest.raises(ElmExportError, match="names the model it was made from; pass --against PATH"):
        find_reference(model)
    with pytest.raises(ElmExportError, match="no such file or folder"):
        find_reference(path, "missing")


@pytest.mark.slow
def test_a_manifest_of_another_model_is_noticed(tiny_artifact: MadeOnce, tmp_path: Path) -> None:
    path = tiny_artifact("onnx", "int8")
    changed = edited(path, tmp_path / "a", lambda manifest: manifest["model"].update(identity="0" * 64))
    with pytest.raises(ElmExportError, match=r"is of the model 000000000000…, fp16 of OpenELM-tiny, "):
        find_reference(changed)
    with pytest.raises(ElmExportError, match=r"manifest\.json: model lacks source; export it again"):
        find_reference(edited(path, tmp_path / "b", lambda manifest: manifest["model"].pop("source")))
    with pytest.raises(ElmExportError, match="lacks bits_per_weight"):
        evaluated_artifact(edited(path, tmp_path / "c", lambda manifest: manifest.pop("bits_per_weight")))


def test_weights_beyond_fp16_are_named(small_checkpoint: MemoryCheckpoint) -> None:
    arrays = {name: array.copy() for name, array in small_checkpoint.arrays.items()}
    name = next(iter(arrays))
    arrays[name].flat[0] = 1e6
    with pytest.raises(ElmExportError, match=rf"{name} holds values up to 1e\+06"):
        TorchRuntime(MemoryCheckpoint(small_checkpoint.config, arrays), rounded_to=torch.float16)


@pytest.mark.slow
def test_an_artifact_with_an_adapter_is_compared_with_the_model_that_has_it(tmp_path: Path, export_to: ExportTo) -> None:
    name = "transformer.layers.0.attn.qkv_proj"
    rows, columns = open_checkpoint("tiny").specs[f"{name}.weight"].shape
    folder = tmp_path / "tuned"
    folder.mkdir()
    save_file(
        {f"{name}.lora_A.weight": torch.full((2, columns), 0.01), f"{name}.lora_B.weight": torch.ones(rows, 2)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    artifact = export_to(open_checkpoint("tiny", adapter=folder), "onnx", "int8")
    reference = find_reference(artifact, adapter=folder)
    assert reference.subject.label == "OpenELM-tiny-tuned fp16"
    given = find_reference(artifact, str(TINY_FOLDER), adapter=folder)
    assert given.subject.model.identity == reference.subject.model.identity
    with pytest.raises(ElmExportError, match=r"was exported with the adapter tuned, whose place .* does not record; pass --adapter PATH"):
        find_reference(artifact)
    with pytest.raises(ElmExportError, match="not the same weights"):
        find_reference(artifact, str(TINY_FOLDER))


@pytest.mark.slow
def test_a_folder_called_tiny_is_not_taken_for_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export_to: ExportTo
) -> None:
    artifact = export_to(open_checkpoint("tiny"), "onnx", "int8")
    other = OpenELMConfig(num_transformer_layers=1, model_dim=64, head_dim=32, vocab_size=64, num_gqa_groups=1, ffn_dim_divisor=32)
    saved(random_checkpoint(other), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert find_reference(artifact).subject.label == "OpenELM-tiny fp16"
