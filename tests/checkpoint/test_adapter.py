"""Low-rank adapters merged as they are read: PEFT's and CoreNet's files, against the formulas in float64 and, where it is installed, PEFT itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Source
from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.models.openelm.config import OpenELMConfig

Tensors = dict[str, torch.Tensor]
QKV, DOWN = "transformer.layers.0.attn.qkv_proj", "transformer.layers.3.ffn.proj_2"
EMBEDDING = "transformer.token_embeddings"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.fixture
def base(tmp_path: Path, deep_config: OpenELMConfig) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {spec.name: torch.randn(spec.shape, generator=generator) for spec in deep_config.weights()}
    save_checkpoint(tmp_path / "base", deep_config, tensors)
    return tmp_path / "base"


def factors(shape: tuple[int, ...], rank: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rank, shape[1]), generator=generator), torch.randn((shape[0], rank), generator=generator)


def write_adapter(folder: Path, tensors: Tensors, config: dict[str, Any] | None = CONFIG) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft_names(module: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    return {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}


def tensor(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name]


def double(values: torch.Tensor) -> NDArray[np.float64]:
    return values.to(torch.float64).numpy()


def check(found: torch.Tensor, expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(double(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("change", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"0.attn.qkv_proj": 3}}, 0.75)])
def test_lora(tmp_path: Path, base: Path, change: dict[str, Any], scale: float) -> None:
    weight = tensor(base, f"{QKV}.weight")
    a, b = factors(tuple(weight.shape))
    adapter = write_adapter(tmp_path / "tuned", peft_names(QKV, a, b), CONFIG | change)
    checkpoint = open_checkpoint(str(base), tokenizer="none", adapter=adapter)
    check(checkpoint.tensor(f"{QKV}.weight"), double(weight) + scale * double(b) @ double(a))
    plain = open_checkpoint(str(base), tokenizer="none")
    for name in checkpoint.specs:
        if name != f"{QKV}.weight":
            assert torch.equal(checkpoint.tensor(name), plain.tensor(name))
    assert checkpoint.source == Source("base-tuned", "local folder with adapter tuned")
    assert checkpoint.notes == ["merged with the adapter tuned: LoRA of rank 4 on 1 matrix"]


def test_dora(tmp_path: Path, base: Path) -> None:
    weight = tensor(base, f"{DOWN}.weight")
    a, b = factors(tuple(weight.shape))
    magnitude = torch.rand(len(weight)) + 0.5
    tensors = peft_names(DOWN, a, b) | {f"base_model.model.{DOWN}.lora_magnitude_vector": magnitude}
    checkpoint = open_checkpoint(str(base), tokenizer="none", adapter=write_adapter(tmp_path / "a", tensors, CONFIG | {"use_dora": True}))
    merged = double(weight) + 2 * double(b) @ double(a)
    check(checkpoint.tensor(f"{DOWN}.weight"), merged / np.linalg.norm(merged, axis=1, keepdims=True) * double(magnitude)[:, None])
    assert "DoRA of rank 4" in checkpoint.notes[0]


def test_identity_changes_with_the_adapter(tmp_path: Path, base: Path) -> None:
    a, b = factors(tuple(tensor(base, f"{QKV}.weight").shape))
    other = write_adapter(tmp_path / "other", peft_names(QKV, a, 1.001 * b))
    scaled = write_adapter(tmp_path / "scaled", peft_names(QKV, a, b), CONFIG | {"lora_alpha": 9})
    plain = write_adapter(tmp_path / "plain", peft_names(QKV, a, b))
    shutil.copytree(plain, tmp_path / "copied")
    identities = [
        open_checkpoint(str(base), tokenizer="none", adapter=adapter).identity()
        for adapter in (None, plain, other, scaled, tmp_path / "copied")
    ]
    assert identities[1] == identities[4] and len(set(identities)) == 4


def test_an_adapted_embedding_unties_the_head(tmp_path: Path, base: Path) -> None:
    """In PEFT's and CoreNet's forward pass the head multiplies the base's own table."""
    weight = tensor(base, f"{EMBEDDING}.weight")
    a, b = factors((weight.shape[1], weight.shape[0]))
    names = {f"base_model.model.{EMBEDDING}.lora_embedding_A": a, f"base_model.model.{EMBEDDING}.lora_embedding_B": b}
    checkpoint = open_checkpoint(str(base), tokenizer="none", adapter=write_adapter(tmp_path / "a", names))
    assert not checkpoint.config.dims.tied
    check(checkpoint.tensor(f"{EMBEDDING}.weight"), double(weight) + 2 * (double(b) @ double(a)).T)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), weight)
    assert "exported as two tables" in checkpoint.notes[1]


def test_whole_tensors(tmp_path: Path, base: Path) -> None:
    table = torch.randn(tensor(base, f"{EMBEDDING}.weight").shape)
    adapter = write_adapter(tmp_path / "a", {f"base_model.model.{EMBEDDING}.modules_to_save.default.weight": table})
    checkpoint = open_checkpoint(str(base), tokenizer="none", adapter=adapter)
    assert checkpoint.config.dims.tied and torch.equal(checkpoint.tensor(f"{EMBEDDING}.weight"), table)
    adapter = write_adapter(tmp_path / "b", {f"base_model.model.{EMBEDDING}.weight": table, "base_model.model.lm_head.weight": table + 1})
    checkpoint = open_checkpoint(str(base), tokenizer="none", adapter=adapter)
    assert not checkpoint.config.dims.tied and torch.equal(checkpoint.tensor("lm_head.weight"), table + 1)


CORENET_YAML = """
model:
  lora:
    use_lora: true
    config:
    - regex: '.*token_embedding.*'
      module_type: embedding
      params: {adapter_name: lora, r: 4, lora_alpha: 4, use_rslora: false}
    - regex: '.*proj.*'
      module_type: linear
      params: {adapter_name: lora, r: 4, lora_alpha: 12, use_rslora: false}
"""


def corenet_adapter(base: Path) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    name = QKV.removeprefix("transformer.")
    a, b = factors(tuple(tensor(base, f"{QKV}.weight").shape))
    return {f"{name}.lora_A.lora.weight": a, f"{name}.lora_B.lora.weight": b}, a, b


@pytest.mark.parametrize(("yaml", "scale"), [(True, 3.0), (False, 1.0)])
def test_corenet_adapter_alone(tmp_path: Path, base: Path, yaml: bool, scale: float) -> None:
    tensors, a, b = corenet_adapter(base)
    (tmp_path / "lora").mkdir()
    torch.save(tensors, tmp_path / "lora" / "checkpoint_last.pt")
    if yaml:
        (tmp_path / "lora" / "config.yaml").write_text(CORENET_YAML)
    checkpoint = open_checkpoint(str(base), tokenizer="none", adapter=tmp_path / "lora")
    check(checkpoint.tensor(f"{QKV}.weight"), double(tensor(base, f"{QKV}.weight")) + scale * double(b) @ double(a))
    assert any("lora_alpha was taken to be the rank" in note for note in checkpoint.notes) is not yaml


def test_corenet_stores_base_and_adapter_in_one(tmp_path: Path, base: Path, deep_config: OpenELMConfig) -> None:
    """As CoreNet's LoRA runs save themselves: `base_layer` beside the factors, and rows that pad the vocabulary."""
    stored = load_file(base / "model.safetensors")
    tensors, a, b = corenet_adapter(base)
    for name, value in stored.items():
        own = name.removeprefix("transformer.")
        wrapped = "proj" in own or "token_embeddings" in own
        tensors[own.replace(".weight", ".base_layer.weight") if wrapped else own] = value
    pad = torch.full((64, deep_config.model_dim), 9.0)
    tensors["token_embeddings.base_layer.weight"] = torch.cat([stored[f"{EMBEDDING}.weight"], pad])
    ea, eb = factors((deep_config.model_dim, deep_config.vocab_size + 64), seed=2)
    tensors |= {"token_embeddings.lora_embedding_A.lora": ea, "token_embeddings.lora_embedding_B.lora": eb}
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(tensors, folder / "openelm_lora.pt")
    (folder / "config.json").write_text(json.dumps(deep_config.to_dict()))
    (folder / "config.yaml").write_text(CORENET_YAML)
    checkpoint = open_checkpoint(str(folder / "openelm_lora.pt"), tokenizer="none")
    assert checkpoint.source.name == "openelm_lora"
    check(checkpoint.tensor(f"{QKV}.weight"), double(stored[f"{QKV}.weight"]) + 3 * double(b) @ double(a))
    check(
        checkpoint.tensor(f"{EMBEDDING}.weight"),
        double(stored[f"{EMBEDDING}.weight"]) + (double(eb) @ double(ea)).T[: deep_config.vocab_size],
    )
    assert torch.equal(checkpoint.tensor("lm_head.weight"), stored[f"{EMBEDDING}.weight"])
    with pytest.raises(ElmExportError, match="holds the adapter and its base in one; give it with --model, without --adapter"):
        open_checkpoint(str(base), tokenizer="none", adapter=folder)


def test_an_adapter_is_no_model(tmp_path: Path, base: Path) -> None:
    a, b = factors(tuple(tensor(base, f"{QKV}.weight").shape))
    adapter = write_adapter(tmp_path / "a", peft_names(QKV, a, b), CONFIG | {"base_model_name_or_path": "apple/OpenELM-270M"})
    words = r"is an adapter, not a model: give its base with --model, and this with --adapter \(--model apple/OpenELM-270M --adapter .*\)"
    for given in (adapter, adapter / "adapter_model.safetensors"):
        with pytest.raises(ElmExportError, match=words):
            open_checkpoint(str(given), tokenizer="none")
    torch.save(corenet_adapter(base)[0], tmp_path / "lora.pt")
    with pytest.raises(ElmExportError, match=r"lora.pt is an adapter, not a model: .* \(--model BASE --adapter"):
        open_checkpoint(str(tmp_path / "lora.pt"), tokenizer="none")


Change = Callable[[Tensors, dict[str, Any]], None]


def set_key(key: str, value: Any) -> Change:
    def change(_: Tensors, config: dict[str, Any]) -> None:
        config[key] = value

    return change


def lose_b(tensors: Tensors, _: dict[str, Any]) -> None:
    del tensors[f"base_model.model.{QKV}.lora_B.weight"]


def other_size(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[f"base_model.model.{QKV}.lora_A.weight"] = torch.zeros(4, 96)


def second_adapter(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors |= {name.replace(".weight", ".second.weight"): value.clone() for name, value in tensors.items()}


def other_model(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors |= {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight": torch.zeros(1) for i in range(40) for x in "AB"}
    config["base_model_name_or_path"] = "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_key("peft_type", "IA3"), r"peft_type is 'IA3'; elmexport merges LORA .*merge_and_unload"),
        (
            set_key("trainable_token_indices", [1, 2]),
            "the adapter uses trainable_token_indices, which elmexport does not merge; merge it with PEFT",
        ),
        (set_key("init_lora_weights", "pissa_niter_16"), "init_lora_weights is 'pissa_niter_16', which changes the base too"),
        (set_key("r", 8), "gives transformer.layers.0.attn.qkv_proj the rank 8, but its matrices have 4; save the adapter again"),
        (set_key("lora_alpha", None), "lora_alpha is None; it must be a number above 0"),
        (set_key("lora_alpha", 1e300), r"lora_alpha is 1e\+300; it must be at most 1e\+30"),
        (set_key("use_dora", True), "lacks lora_magnitude_vector of transformer.layers.0.attn.qkv_proj"),
        (lose_b, "lacks lora_B of transformer.layers.0.attn.qkv_proj; save it again"),
        (other_size, r"has other sizes than the model: .*lora_B.weight \[\d+, 4\] times .*lora_A.weight \[4, 96\] is no \[\d+, 192\]"),
        (second_adapter, "holds 2 adapters"),
        (other_model, "and 77 more. Give --model the base that it was trained on, meta-llama/Llama-2-7b-hf"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", None),
)
def test_refused(tmp_path: Path, base: Path, change: Change, words: str) -> None:
    a, b = factors(tuple(tensor(base, f"{QKV}.weight").shape))
    tensors, config = peft_names(QKV, a, b), dict(CONFIG)
    change(tensors, config)
    adapter = write_adapter(tmp_path / "a", tensors, config)
    with pytest.raises(ElmExportError, match=words) as caught:
        open_checkpoint(str(base), tokenizer="none", adapter=adapter)
    assert len(str(caught.value).replace(str(adapter), "FOLDER")) <= 600


def test_no_adapter_there(tmp_path: Path, base: Path) -> None:
    for path, words in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path, "holds neither adapter_model.safetensors"),
        (base / "config.json", "of another kind"),
    ):
        with pytest.raises(ElmExportError, match=rf"--adapter {path}: .*{words}"):
            open_checkpoint(str(base), tokenizer="none", adapter=path)
    folder = tmp_path / "empty"
    folder.mkdir()
    torch.save({"x": torch.zeros(1)}, folder / "x.pt")
    with pytest.raises(ElmExportError, match="holds no LoRA tensors"):
        open_checkpoint(str(base), tokenizer="none", adapter=folder)


def test_base_of_another_name_is_noted(tmp_path: Path, base: Path) -> None:
    a, b = factors(tuple(tensor(base, f"{QKV}.weight").shape))
    for named, noted in (("someone/Other", True), ("someone/Base", False), (str(base), False)):
        config = CONFIG | {"base_model_name_or_path": named}
        adapter = write_adapter(tmp_path / str(len(named)), peft_names(QKV, a, b), config)
        notes = open_checkpoint(str(base), tokenizer="none", adapter=adapter).notes
        assert any(f"trained on {named}; it was merged into base" in note for note in notes) is noted


@pytest.mark.slow
def test_export_says_what_it_merged(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    from elmexport.exporting import export

    a, b = factors(tuple(tensor(TINY_FOLDER, f"{QKV}.weight").shape))
    adapter = write_adapter(tmp_path / "tuned", peft_names(QKV, 0.01 * a, 0.01 * b))
    result = export("tiny", "onnx", "fp32", adapter=adapter, out=tmp_path / "out")
    plain = export("tiny", "onnx", "fp32", out=tmp_path / "plain")
    model = result.manifest.model
    assert (model.name, model.source) == ("OpenELM-tiny-tuned", "embedded with adapter tuned")
    assert model.identity != plain.manifest.model.identity and result.manifest.self_check.kl_mean is not None
    assert "merged with the adapter tuned: LoRA of rank 4 on 1 matrix" in result.notes


PEFT_KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["qkv_proj", "out_proj", "proj_1", "proj_2"]},
    "rslora": {"target_modules": ["qkv_proj"], "use_rslora": True},
    "dora": {"target_modules": ["qkv_proj", "proj_2"], "use_dora": True},
    "patterns": {
        "target_modules": ["qkv_proj", "proj_2"],
        "rank_pattern": {"layers.1.attn.qkv_proj": 3},
        "alpha_pattern": {"proj_2": 5, "0.attn.qkv_proj": 7},
    },
    "embedding": {"target_modules": ["token_embeddings", "proj_2"]},
    "embedding-dora": {"target_modules": ["token_embeddings", "proj_2"], "use_dora": True},
    "whole-embedding": {"target_modules": ["qkv_proj"], "modules_to_save": ["token_embeddings"]},
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_peft_merges_to_the_same_weights(tmp_path: Path, base: Path, kind: str, safe: bool) -> None:
    peft = pytest.importorskip(
        "peft", reason="PEFT, which merges the same adapters, is not installed: pip install peft; the formulas are tested above"
    )
    from tests.checkpoint.peft_model import NamedModel

    plain = open_checkpoint(str(base), tokenizer="none")
    torch.manual_seed(0)
    model = peft.get_peft_model(NamedModel(plain), peft.LoraConfig(r=8, lora_alpha=16, **PEFT_KINDS[kind]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    if not safe:  # as earlier versions of PEFT wrote it
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    merged = dict(model.merge_and_unload().named_parameters())
    checkpoint = open_checkpoint(str(base), tokenizer="none", adapter=tmp_path / "adapter")
    changed = 0
    for name, expected in merged.items():
        torch.testing.assert_close(checkpoint.tensor(name), expected.data, rtol=1e-5, atol=1e-5)
        changed += not torch.equal(plain.tensor(name), expected.data)
    assert changed >= 5


def test_peft_keeps_the_head_of_an_adapted_embedding(tmp_path: Path, base: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT, which merges the same adapters, is not installed: pip install peft")
    from tests.checkpoint.peft_model import NamedModel

    plain = open_checkpoint(str(base), tokenizer="none")
    model = peft.get_peft_model(NamedModel(plain), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["token_embeddings"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    checkpoint = open_checkpoint(str(base), tokenizer="none", adapter=tmp_path / "adapter")
    ids = torch.arange(10)
    table = model.base_model.model.transformer.token_embeddings
    torch.testing.assert_close(checkpoint.tensor(f"{EMBEDDING}.weight")[ids], table(ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), table.weight)  # what a tied model's head multiplies


def test_untied_models(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    config = replace(deep_config, share_input_output_layers=False)
    generator = torch.Generator().manual_seed(0)
    save_checkpoint(tmp_path / "base", config, {spec.name: torch.randn(spec.shape, generator=generator) for spec in config.weights()})
    weight = tensor(tmp_path / "base", "lm_head.weight")
    a, b = factors(tuple(weight.shape))
    checkpoint = open_checkpoint(
        str(tmp_path / "base"), tokenizer="none", adapter=write_adapter(tmp_path / "a", peft_names("lm_head", a, b))
    )
    check(checkpoint.tensor("lm_head.weight"), double(weight) + 2 * double(b) @ double(a))
