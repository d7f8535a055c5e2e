"""Folders in Apple's layout: what is read is what was stored, and damaged ones are refused with a message that says what to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.models.openelm.config import OpenELMConfig

Tensors = dict[str, torch.Tensor]
NORM = "transformer.layers.2.attn_norm.weight"
EMBEDDING = "transformer.token_embeddings.weight"


@pytest.fixture
def tensors(small_config: OpenELMConfig) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in small_config.weights()}


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ElmExportError, match=message):
        open_checkpoint(str(folder), tokenizer="none", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_stored(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors, dtype: torch.dtype, shards: int) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_checkpoint(tmp_path / "mine", small_config, stored, shards=shards)
    checkpoint = open_checkpoint(str(tmp_path / "mine"))
    assert (checkpoint.source.name, checkpoint.source.origin, checkpoint.source.revision) == ("mine", "local folder", None)
    assert checkpoint.config.to_dict() == small_config.to_dict()
    for name, tensor in stored.items():
        found = checkpoint.tensor(name)
        assert found.dtype == dtype and torch.equal(found, tensor)


def test_identity_depends_on_content_alone(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    def identity(name: str, config: OpenELMConfig = small_config, values: Tensors = tensors, shards: int = 1) -> str:
        save_checkpoint(tmp_path / name, config, values, shards=shards)
        return open_checkpoint(str(tmp_path / name), tokenizer="none").identity()

    first = identity("one")
    assert identity("many", shards=4) == first
    assert identity("reversed", values=dict(reversed(tensors.items()))) == first
    changed = dict(tensors) | {NORM: tensors[NORM] + torch.eye(192)[0]}
    different = [identity("changed", values=changed), identity("half", values={name: t.half() for name, t in tensors.items()})]
    different.append(identity("config", config=replace(small_config, rope_freq_constant=20000)))
    assert len({first, *different}) == 4


def test_opening_reads_no_tensor(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    """NaN, by name and count, only when the tensor is read."""
    tensors[NORM][3] = float("nan")
    tensors[NORM][5] = float("inf")
    save_checkpoint(tmp_path, small_config, tensors)
    checkpoint = open_checkpoint(str(tmp_path), tokenizer="none")
    assert checkpoint.tensor("transformer.norm.weight").isfinite().all()
    with pytest.raises(ElmExportError, match=rf"{NORM} holds 2 values that are NaN or infinite, of 192; .* download or save it again"):
        checkpoint.tensor(NORM)


def test_missing_extra_and_misshapen_tensors(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    del tensors[NORM]
    tensors["transformer.layers.9.ffn.bias"] = torch.zeros(3)
    tensors["transformer.norm.weight"] = torch.zeros(7)
    save_checkpoint(tmp_path, small_config, tensors)
    refused(tmp_path, f"missing tensors: {NORM}; extra tensors: transformer.layers.9.ffn.bias; ")
    refused(tmp_path, r"wrong shapes: transformer.norm.weight is \[7\], config.json calls for \[192\]. Use the config.json that belongs")


def test_config_of_another_model(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, small_config, tensors)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"num_kv_heads": [1, 2, 4]}))
    refused(tmp_path, r"num_kv_heads\[2\] is 4, but layer 2 has 3")
    path.write_text(json.dumps(data | {"activation_fn_name": "gelu"}))
    refused(tmp_path, "activation_fn_name is 'gelu'; elmexport supports swish and silu")
    path.unlink()
    refused(tmp_path, r"config.json: no such file; a checkpoint folder holds config.json beside its weights")


@pytest.mark.parametrize("kept", [0, 5, 2_000, 1_000_000])
def test_truncated(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors, kept: int) -> None:
    save_checkpoint(tmp_path, small_config, tensors)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, r"model.safetensors is truncated or corrupt \(.+\); download or save it again")


def test_corrupt_header(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, small_config, tensors)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[100:110] = b"\xff" * 10
    path.write_bytes(content)
    refused(tmp_path, "model.safetensors is truncated or corrupt")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(tmp_path, "is a Git LFS pointer, not the weights themselves; run `git lfs pull`")


def test_broken_shards(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, small_config, tensors, shards=2)
    index, second = tmp_path / "model.safetensors.index.json", tmp_path / "model-00002-of-00002.safetensors"
    data = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": data["weight_map"] | {"transformer.ghost": second.name}}))
    refused(tmp_path, "lists tensors that its files do not hold: transformer.ghost; download or save the checkpoint again")
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused(tmp_path, "names of files in the same folder")
    index.write_text("{}")
    refused(tmp_path, "is not an index of weights")
    index.write_text(json.dumps(data))
    second.unlink()
    refused(tmp_path, f"lacks {second.name}, of the 2 files that model.safetensors.index.json names; download the missing files")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_other_dtypes(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors, dtype: torch.dtype) -> None:
    save_checkpoint(tmp_path, small_config, tensors | {NORM: tensors[NORM].to(dtype)})
    refused(tmp_path, rf"stored as something else than BF16, F16, F32: {NORM} is (F64|I8). Save the checkpoint in one of these types")


def test_tied_model_that_stores_its_head(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    embedding = tensors["transformer.token_embeddings.weight"]
    save_checkpoint(tmp_path / "plain", small_config, tensors)
    save_checkpoint(tmp_path / "equal", small_config, tensors | {"lm_head.weight": embedding.clone()})
    equal = open_checkpoint(str(tmp_path / "equal"), tokenizer="none")
    assert "lm_head.weight" not in equal.stored_shapes()
    assert equal.identity() == open_checkpoint(str(tmp_path / "plain"), tokenizer="none").identity()
    save_checkpoint(tmp_path / "other", small_config, tensors | {"lm_head.weight": embedding + 1})
    refused(tmp_path / "other", "share_input_output_layers is true.* holds? an? lm_head.weight that differs")


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("same_dtype", [True, False])
def test_tied_head_stored_with_other_rounding(
    tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors, rounded: torch.dtype, same_dtype: bool
) -> None:
    embedding = tensors[EMBEDDING]
    embedding[0, :4] = torch.tensor([1e-9, -3e-8, 7e-7, 60000.0])  # fp16 has few bits, or none, for the small ones
    head = embedding.to(rounded).to(torch.float32) if same_dtype else embedding.to(rounded)
    save_checkpoint(tmp_path, small_config, tensors | {"lm_head.weight": head})
    checkpoint = open_checkpoint(str(tmp_path), tokenizer="none")
    dtype = "float32" if same_dtype else str(rounded).removeprefix("torch.")
    assert checkpoint.notes == [
        f"lm_head.weight ({dtype}) is {EMBEDDING} (float32) but for rounding; the model shares the two, and the embedding was taken"
    ]
    assert "lm_head.weight" not in checkpoint.stored_shapes()
    save_checkpoint(tmp_path, small_config, tensors | {"lm_head.weight": (1.02 * embedding).to(rounded)})
    refused(tmp_path, "hold a lm_head.weight that differs from transformer.token_embeddings.weight")


def test_buffers_are_no_weights(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    buffers = {
        "transformer.causal_mask": torch.ones(4, 4, dtype=torch.bool),
        "transformer.position_ids": torch.arange(8),
        "transformer.layers.0.attn.pos_embedding.inv_freq": torch.ones(16),
    }
    save_checkpoint(tmp_path, small_config, tensors | buffers)
    checkpoint = open_checkpoint(str(tmp_path), tokenizer="none")
    (note,) = checkpoint.notes
    assert note.startswith("3 stored buffers are no weights and were left out: ")
    for part in ("transformer.causal_mask (BOOL)", "transformer.position_ids (I64)", "inv_freq (F32)"):
        assert part in note
    assert set(checkpoint.stored_shapes()) == set(tensors)


def test_quantized_weights_are_no_buffers(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    extra = {f"{name}.absmax": torch.zeros(4, dtype=torch.uint8) for name in tensors if "proj" in name}
    save_checkpoint(tmp_path, small_config, tensors | extra)
    refused(tmp_path, "These are quantized weights, which cannot be exported; use the model that they were made from")


def test_no_weights(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, small_config, tensors)
    shutil.move(tmp_path / "model.safetensors", tmp_path / "weights.safetensors")
    refused(tmp_path, "holds neither model.safetensors nor model.safetensors.index.json")
    refused(tmp_path / "weights.safetensors", "is a file of another kind; give --model the folder that holds it")


def test_saved_in_apples_layout(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    """Read back with safetensors itself."""
    save_checkpoint(tmp_path, small_config, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys()


def test_files_of_others_open(tmp_path: Path, small_config: OpenELMConfig, tensors: Tensors) -> None:
    """Without metadata, and with `config.json` fields that we do not know."""
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_config.to_dict() | {"auto_map": {}, "transformers_version": "9"}))
    assert torch.equal(open_checkpoint(str(tmp_path), tokenizer="none").tensor(NORM), tensors[NORM])
