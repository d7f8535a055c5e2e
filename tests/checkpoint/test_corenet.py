"""CoreNet `.pt` files: CoreNet's key names, no code, damaged ones refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.corenet import fits
from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.models import find_model
from elmexport.models.openelm.config import OpenELMConfig

State = dict[str, torch.Tensor]

# The state dictionary of a GeneralGPTModel of one layer, as CoreNet's modules name it.
ONE_LAYER = {
    "token_embeddings.weight",
    "layers.0.attn.qkv_proj.weight",
    "layers.0.attn.q_norm.weight",
    "layers.0.attn.k_norm.weight",
    "layers.0.attn.out_proj.weight",
    "layers.0.ffn.proj_1.weight",
    "layers.0.ffn.proj_2.weight",
    "layers.0.ffn_norm.weight",
    "layers.0.attn_norm.weight",
    "norm.weight",
    "classifier.weight",
}


def corenet_state(config: OpenELMConfig) -> State:
    generator = torch.Generator().manual_seed(0)
    names = {spec.name: spec.name.removeprefix("transformer.").replace("lm_head", "classifier") for spec in config.weights()}
    return {names[spec.name]: torch.randn(spec.shape, generator=generator) for spec in config.weights()}


@pytest.fixture
def state(small_config: OpenELMConfig) -> State:
    return corenet_state(small_config)


def save(path: Path, state: Any, config: OpenELMConfig | None = None) -> Path:
    torch.save(state, path)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        open_checkpoint(str(path), tokenizer="none")


def test_key_names(tmp_path: Path, small_config: OpenELMConfig) -> None:
    config = replace(small_config, num_transformer_layers=1, qkv_multipliers=1.0, ffn_multipliers=1.0, share_input_output_layers=False)
    state = corenet_state(config)
    assert set(state) == ONE_LAYER
    checkpoint = open_checkpoint(str(save(tmp_path / "one.pt", state, config)), tokenizer="none")
    assert torch.equal(checkpoint.tensor("lm_head.weight"), state["classifier.weight"])
    assert torch.equal(checkpoint.tensor("transformer.layers.0.ffn.proj_1.weight"), state["layers.0.ffn.proj_1.weight"])


def test_equals_the_safetensors_checkpoint(tmp_path: Path, small_config: OpenELMConfig, state: State) -> None:
    path = save(tmp_path / "checkpoint_average.pt", state, small_config)
    save_checkpoint(tmp_path / "apple", small_config, {f"transformer.{name}": tensor for name, tensor in state.items()})
    corenet, apple = (open_checkpoint(str(where), tokenizer="none") for where in (path, tmp_path / "apple"))
    assert corenet.identity() == apple.identity()
    assert (corenet.source.name, corenet.source.origin) == ("checkpoint_average", "CoreNet checkpoint")


@pytest.mark.parametrize("wrap", [lambda s: {"model_state_dict": s, "epoch": 3}, lambda s: {f"module.{name}": t for name, t in s.items()}])
def test_training_checkpoints_and_data_parallel_names(tmp_path: Path, small_config: OpenELMConfig, state: State, wrap: Any) -> None:
    save(tmp_path / "last.pt", wrap(state), small_config)
    assert torch.equal(open_checkpoint(str(tmp_path), tokenizer="none").tensor("transformer.norm.weight"), state["norm.weight"])


def test_files_from_before_the_zip_format(tmp_path: Path, small_config: OpenELMConfig, state: State) -> None:
    save(tmp_path / "old.pt", state, small_config)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(open_checkpoint(str(tmp_path), tokenizer="none").tensor("transformer.norm.weight"), state["norm.weight"])


def test_known_model_needs_no_config(tmp_path: Path) -> None:
    tiny = find_model("tiny")
    assert tiny is not None
    checkpoint = open_checkpoint(str(save(tmp_path / "x.pt", corenet_state(tiny.config))), tokenizer="none")
    assert checkpoint.source.name == "x" and checkpoint.config == tiny.config


def test_only_one_known_model_fits() -> None:
    models = [find_model(alias) for alias in ("tiny", "270M", "450M", "1.1B", "3B")]
    for model in models:
        assert model is not None
        shapes = {spec.name: spec.shape for spec in model.config.weights()}
        assert [other.alias for other in models if other and fits(other.config, shapes)] == [model.alias]


def test_unknown_model_without_config(tmp_path: Path, state: State) -> None:
    refused(save(tmp_path / "x.pt", state), r"do not fit any known model \(OpenELM-tiny, OpenELM-270M, .*\); put the model's config.json")


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_code_is_named_and_not_run(tmp_path: Path, state: State) -> None:
    marker = tmp_path / "ran"
    path = save(tmp_path / "evil.pt", {**state, "extra": Exploit(marker)})
    refused(path, r"evil.pt holds Python code \((posix|nt)\.system\) besides tensors; it was not run")
    assert not marker.exists()


def test_damaged(tmp_path: Path, small_config: OpenELMConfig, state: State) -> None:
    path = save(tmp_path / "x.pt", state, small_config)
    content = path.read_bytes()
    for kept in (0, 10, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:kept])
        refused(path, r"x\.pt is (truncated or corrupt|not a PyTorch checkpoint, or is damaged).*download it again")


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02h\x05.", b"ab", b".", b"0", b"R"])
def test_no_pickle_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    refused(tmp_path / "x.pt", r"x\.pt is (truncated or corrupt|not a PyTorch checkpoint, or is damaged).*download it again")


def test_other_contents(tmp_path: Path, small_config: OpenELMConfig, state: State) -> None:
    refused(save(tmp_path / "x.pt", [1, 2], small_config), "holds a list, not a state dictionary")
    refused(save(tmp_path / "x.pt", {**state, "step": 3}), "holds entries that are not tensors: step")
    refused(save(tmp_path / "x.pt", {**state, "norm.weight": state["norm.weight"].double()}), ": norm.weight is F64")
    del state["norm.weight"]
    refused(save(tmp_path / "x.pt", state), "missing tensors: transformer.norm.weight")
    save(tmp_path / "y.pt", state)
    refused(tmp_path, r"holds 2 .pt files \(x.pt, y.pt\); give --model one of them")


def padded(state: State, rows: int) -> State:
    """With `rows` more rows, as CoreNet's training pads the vocabulary; what they hold must not matter."""
    name = "token_embeddings.weight"
    return state | {name: torch.cat([state[name], torch.full((rows, state[name].shape[1]), 9.0)])}


@pytest.mark.parametrize("config_beside", [True, False])
def test_rows_that_pad_the_vocabulary(tmp_path: Path, config_beside: bool) -> None:
    tiny = find_model("tiny")
    assert tiny is not None and isinstance(tiny.config, OpenELMConfig)
    state = corenet_state(tiny.config)
    plain = open_checkpoint(str(save(tmp_path / "plain.pt", state, tiny.config)), tokenizer="none")
    (tmp_path / "config.json").unlink()
    path = save(tmp_path / "padded.pt", padded(state, 128), tiny.config if config_beside else None)
    checkpoint = open_checkpoint(str(path), tokenizer="none")
    assert checkpoint.identity() == plain.identity()
    assert checkpoint.tensor("transformer.token_embeddings.weight").shape == (4096, 256)
    assert checkpoint.notes == [
        "token_embeddings.weight has 4,224 rows for 4,096 tokens: the last 128 were taken for padding and left out "
        "(if they are tokens, set vocab_size to 4224 in config.json)"
    ]


def test_padding_of_the_published_sizes() -> None:
    """32,128 rows for 32,000 tokens."""
    for alias in ("270M", "450M", "1.1B", "3B"):
        model = find_model(alias)
        assert model is not None
        shapes = {spec.name: spec.shape for spec in model.config.weights()}
        name = "transformer.token_embeddings.weight"
        assert fits(model.config, shapes | {name: (32128, shapes[name][1])})
        assert not fits(model.config, shapes | {name: (32001, shapes[name][1])})  # a token more is no padding


def test_untied_heads_are_cropped_too(tmp_path: Path, small_config: OpenELMConfig) -> None:
    config = replace(small_config, share_input_output_layers=False)
    state = corenet_state(config)
    head = torch.cat([state["classifier.weight"], torch.zeros(64, small_config.model_dim)])
    checkpoint = open_checkpoint(str(save(tmp_path / "x.pt", padded(state, 64) | {"classifier.weight": head}, config)), tokenizer="none")
    assert torch.equal(checkpoint.tensor("lm_head.weight"), state["classifier.weight"])


def test_added_rows_that_are_no_padding(tmp_path: Path, small_config: OpenELMConfig, state: State) -> None:
    for rows in (3, 256):
        refused(save(tmp_path / "x.pt", padded(state, rows), small_config), f"set vocab_size to {512 + rows} in config.json")
