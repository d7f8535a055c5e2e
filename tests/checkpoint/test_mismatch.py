"""Weights that do not fit: at most three names, how many more, the likely cause, and no message that fills a screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError, listed
from elmexport.models.openelm.config import OpenELMConfig

Tensors = dict[str, torch.Tensor]
EMBEDDING = "transformer.token_embeddings.weight"
LONGEST = 600


@pytest.fixture
def tensors(deep_config: OpenELMConfig) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in deep_config.weights()}


def message(folder: Path) -> str:
    with pytest.raises(ElmExportError) as caught:
        open_checkpoint(str(folder), tokenizer="none")
    assert len(str(caught.value).replace(str(folder), "FOLDER")) <= LONGEST
    return str(caught.value)


def rename(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def drop(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def quantize(tensors: Tensors) -> Tensors:
    new: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "layers" in name:
            stem = name.removesuffix(".weight")
            new |= {
                f"{stem}.qweight": torch.zeros(2, 2, dtype=torch.int32),
                f"{stem}.scales": torch.zeros(2),
                f"{stem}.g_idx": torch.zeros(2),
            }
        else:
            new[name] = tensor
    return new


def add_biases(tensors: Tensors) -> Tensors:
    return tensors | {name.replace(".weight", ".bias"): tensor[..., 0].clone() for name, tensor in tensors.items() if tensor.dim() == 2}


def add_layers(tensors: Tensors) -> Tensors:
    return tensors | {f"transformer.layers.{i}.attn_norm.weight": torch.ones(192) for i in range(5, 60)}


def add_rows(tensors: Tensors) -> Tensors:
    return tensors | {EMBEDDING: torch.cat([tensors[EMBEDDING], torch.zeros(3, 192)])}


def long_names(tensors: Tensors) -> Tensors:
    return tensors | {f"{'x' * 3000}.{i}.weight": torch.zeros(1) for i in range(40)}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            rename(lambda name: f"gpt.{name}"),
            ["missing tensors: transformer.token_embeddings.weight, ", " more; extra", "None is a tensor of openelm"],
        ),
        (drop("layers.4."), ["and 5 more. The weights have 4 layers, config.json says 5"]),
        (drop("ffn.proj_1"), ["and 2 more. The weights are incomplete (a file may be missing)"]),
        (quantize, ["These are quantized weights, which cannot be exported"]),
        (add_biases, ["openelm models have no biases"]),
        (add_layers, ["and 52 more. The weights have 60 layers, config.json says 5"]),
        (add_rows, ["is [515, 192], config.json calls for [512, 192]", "set vocab_size to 515 in config.json"]),
        (long_names, ["and 37 more", "…"]),
    ],
    ids=["other-names", "layer-missing", "file-missing", "quantized", "biases", "more-layers", "added-tokens", "long-names"],
)
def test_likely_causes(
    tmp_path: Path, deep_config: OpenELMConfig, tensors: Tensors, change: Callable[[Tensors], Tensors], parts: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(deep_config.to_dict()))
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, tmp_path / "model.safetensors")
    found = message(tmp_path)
    for part in parts:
        assert part in found
    assert found.count("transformer.") <= 10


def test_an_untied_model_without_a_head(tmp_path: Path, deep_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, replace(deep_config, share_input_output_layers=False), tensors)
    assert (
        "missing tensors: lm_head.weight. If the output layer is to share the embedding, set share_input_output_layers to true"
        in message(tmp_path)
    )


def test_config_of_another_size(tmp_path: Path, deep_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, replace(deep_config, model_dim=256), tensors)
    assert "and 29 more. Use the config.json that belongs to these weights" in message(tmp_path)


def test_hundreds_of_files_missing(tmp_path: Path, deep_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, deep_config, tensors, shards=30)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert "model-00003-of-00030.safetensors and 27 more, of the 30 files" in message(tmp_path)


def test_an_index_of_tensors_that_are_not_there(tmp_path: Path, deep_config: OpenELMConfig, tensors: Tensors) -> None:
    save_checkpoint(tmp_path, deep_config, tensors, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    ghosts = {f"{'y' * 500}.{i}": next(iter(weight_map.values())) for i in range(300)}
    index.write_text(json.dumps({"weight_map": weight_map | ghosts}))
    assert "and 297 more; download or save the checkpoint again" in message(tmp_path)


def test_many_pt_files(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"training_checkpoint_epoch_{i}_iter_{1000 * i}.pt").touch()
    assert "holds 200 .pt files" in message(tmp_path) and "and 197 more" in message(tmp_path)


def test_listed() -> None:
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert listed(["x" * 100]) == "x" * 79 + "…"
