"""The GGUF artifact: what lies in the file, as gguf's own reader finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants
from numpy.typing import NDArray

from calibration.options import WeightOptions
from calibration.weight_set import WeightSet
from elmexport.errors import ElmExportError
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Rule, resolve
from elmexport.quantization.schemes import Integer, find_scheme
from elmexport.runtimes import open_artifact
from elmexport.target import find_target
from targets.gguf import ALIASES, GgufTarget
from targets.gguf.metadata import describe, file_name, file_type
from tests.conftest import ExportTo, SmallArtifact
from tests.graph.test_forward import token_ids
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.reference import kl, q8_0, reference_logits

QUANTS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(small_artifact: SmallArtifact) -> Exported:
    """`exported(quant)`: the artifact of the small checkpoint, made once."""
    return partial(small_artifact, "gguf")


def gguf_path(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def metadata(folder: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(gguf_path(folder)).fields.items()}


def tensors_of(folder: Path) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """Type and dequantized value of every tensor."""
    return {t.name: (t.tensor_type.name, quants.dequantize(t.data, t.tensor_type)) for t in GGUFReader(gguf_path(folder)).tensors}


def expected_names(config: OpenELMConfig) -> dict[str, tuple[str, slice]]:
    """For each tensor of llama.cpp's `openelm`: the checkpoint's tensor, and the rows of it."""
    names = {"token_embd": ("transformer.token_embeddings", slice(None)), "output_norm": ("transformer.norm", slice(None))}
    for i, layer in enumerate(config.layers):
        gate, up = slice(0, layer.ffn_dim), slice(layer.ffn_dim, 2 * layer.ffn_dim)
        for theirs, (ours, rows) in {
            "attn_norm": ("attn_norm", slice(None)),
            "attn_qkv": ("attn.qkv_proj", slice(None)),
            "attn_q_norm": ("attn.q_norm", slice(None)),
            "attn_k_norm": ("attn.k_norm", slice(None)),
            "attn_output": ("attn.out_proj", slice(None)),
            "ffn_norm": ("ffn_norm", slice(None)),
            "ffn_gate": ("ffn.proj_1", gate),
            "ffn_up": ("ffn.proj_1", up),
            "ffn_down": ("ffn.proj_2", slice(None)),
        }.items():
            names[f"blk.{i}.{theirs}"] = (f"transformer.layers.{i}.{ours}", rows)
    return {f"{theirs}.weight": (f"{ours}.weight", rows) for theirs, (ours, rows) in names.items()}


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_one_self_contained_file(exported: Exported, quant: str) -> None:
    names = sorted(path.name for path in exported(quant).iterdir())
    assert names == ["Modelfile", "README.md", f"Small-782K-{QUANTS[quant]}.gguf", "manifest.json"]


def test_modelfile(exported: Exported) -> None:
    assert (exported("int4") / "Modelfile").read_text(encoding="utf-8").splitlines() == [
        "FROM ./Small-782K-Q4_0.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        "PARAMETER num_ctx 128",
    ]


@pytest.mark.parametrize("quant", FLOATS)
def test_float_tensors_are_the_checkpoints(exported: Exported, small_checkpoint: MemoryCheckpoint, quant: str) -> None:
    found = tensors_of(exported(quant))
    names = expected_names(small_checkpoint.config)
    assert found.keys() == names.keys()  # so there is no output.weight
    for theirs, (ours, rows) in names.items():
        kind, value = found[theirs]
        norm = small_checkpoint.specs[ours].role.is_norm
        assert kind == ("F32" if norm else QUANTS[quant]), theirs
        wanted = torch.from_numpy(small_checkpoint.arrays[ours][rows]).to(torch.float32 if norm else FLOATS[quant]).to(torch.float32)
        assert np.array_equal(value, wanted.numpy()), theirs


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantized_tensors_are_bit_identical_to_our_own(export_to: ExportTo, small_checkpoint: MemoryCheckpoint, quant: str) -> None:
    found = tensors_of(export_to(small_checkpoint, "gguf", quant, weights=WeightOptions(calibrate="none")))
    plan = resolve(GgufTarget().recipe(quant), small_checkpoint.config)
    for theirs, (ours, rows) in expected_names(small_checkpoint.config).items():
        scheme = plan.schemes[ours]
        kind, value = found[theirs]
        if not isinstance(scheme, Integer):
            assert kind == "F32", theirs
            continue
        assert kind == ("Q8_0" if scheme.width == 8 else "Q4_0"), theirs
        weight = quantize(torch.from_numpy(small_checkpoint.arrays[ours]), scheme)
        assert np.array_equal(value, weight.dequantize().numpy()[rows]), theirs
    assert found["token_embd.weight"][0] == "Q8_0"
    assert found["blk.0.ffn_up.weight"][0] == QUANTS[quant]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "mse", "gptq"])
def test_5_bit_blocks_are_q5_0(
    export_to: ExportTo,
    small_checkpoint: MemoryCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Literal["rtn", "mse", "gptq"],
) -> None:
    """Codes and scales as they are, the same from a weight set; llama.cpp computes with them and activations in Q8_0."""
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'name = "mine"\nwords = "5-bit"\nactivations = "fp32"\nnorms = "fp32"\nscales = "fp16"\nfallback = "fp16"\nmax_self_check_kl = 0.3\n'
        '[[rule]]\nscheme = "int5-block32"\n'
    )
    saved = tmp_path / "set.safetensors"
    if method == "gptq":
        weights = WeightOptions(method="gptq", tokens=256, save_weights_to=saved)
    else:
        weights = WeightOptions(method=method, calibrate="none")
    folder = export_to(small_checkpoint, "gguf", str(recipe), weights=weights)
    assert metadata(folder)["general.file_type"] == LlamaFileType.MOSTLY_Q5_0
    found = tensors_of(folder)
    arrays = dict(small_checkpoint.arrays)
    for theirs, (ours, rows) in expected_names(small_checkpoint.config).items():
        spec = small_checkpoint.specs[ours]
        kind, value = found[theirs]
        assert kind == ("F32" if spec.role.is_norm else "Q5_0"), theirs
        if not spec.role.is_norm:
            if method == "gptq":
                weight = WeightSet.load(saved).get(spec)
            else:
                weight = quantize(small_checkpoint.tensor(ours), find_scheme("int5-block32"), method)
            arrays[ours] = weight.dequantize().numpy()
            assert np.array_equal(value, arrays[ours][rows]), theirs
    runtime = open_artifact(folder)
    prompts = token_ids(60, small_checkpoint.config).reshape(12, 5)
    losses = [kl(reference_logits(small_checkpoint.config, arrays, ids, rounded=q8_0), runtime.logits(ids)).max() for ids in prompts]
    # Where an activation lies just between two codes, float32 and float64 take different ones: a few prompts differ, the others agree.
    assert np.median(losses) < 1e-10
    assert max(losses) < 2e-3


def test_metadata(exported: Exported, small_config: OpenELMConfig) -> None:
    found = metadata(exported("int4"))
    layers = small_config.layers
    expected = {
        "general.architecture": "openelm",
        "general.type": "model",
        "general.name": "Small",
        "general.file_type": LlamaFileType.MOSTLY_Q4_0,
        "general.quantization_version": 2,
        "openelm.block_count": 3,
        "openelm.context_length": 128,
        "openelm.embedding_length": 192,
        "openelm.feed_forward_length": [layer.ffn_dim for layer in layers],
        "openelm.attention.head_count": [3, 6, 9],
        "openelm.attention.head_count_kv": [1, 2, 3],
        "openelm.rope.freq_base": 10000,
        "openelm.rope.dimension_count": 32,
        "openelm.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "openelm.attention.key_length": 32,
        "openelm.attention.value_length": 32,
    }
    assert {key: found[key] for key in expected} == expected
    assert {key.split(".")[0] for key in found} == {"GGUF", "general", "openelm", "tokenizer"}


@pytest.mark.parametrize("quant", QUANTS)
def test_file_type(exported: Exported, quant: str) -> None:
    kind = metadata(exported(quant))["general.file_type"]
    assert LlamaFileType(kind).name == ("ALL_F32" if quant == "fp32" else f"MOSTLY_{QUANTS[quant]}")


@pytest.mark.parametrize(
    ("last", "expected"),
    [("ggml-q4_k", "Q4_K_S"), ("ggml-q6_k", "Q6_K"), ("int4-block64", "Q8_0"), ("fp32", "F32")],
)
def test_file_type_of_a_recipe_that_llama_cpp_has_no_name_for(last: str, expected: str) -> None:
    """The type of its last rule, save for one that the format does not know, as no tensor needs it."""
    recipe = find_target("gguf").recipe("int8")
    rules = (*(Rule(find_scheme(name)) for name in ("int8-block32", last)),)
    assert file_type(replace(recipe, name="mine", rules=rules)) == expected


@pytest.mark.parametrize(
    ("name", "parameters", "file", "expected"),
    [
        ("OpenELM-450M", 457179136, "OpenELM-450M-Q4_0", {"name": "OpenELM 450M", "basename": "OpenELM", "size_label": "450M"}),
        (
            "OpenELM-3B-Instruct",
            3036647424,
            "OpenELM-3B-Instruct-Q4_0",
            {"name": "OpenELM 3B Instruct", "basename": "OpenELM", "finetune": "Instruct", "size_label": "3B"},
        ),
        ("mine", 1396832, "Mine-1.4M-Q4_0", {"name": "Mine", "size_label": "1.4M"}),
    ],
)
def test_names_in_the_metadata(tmp_path: Path, name: str, parameters: int, file: str, expected: dict[str, str]) -> None:
    facts = describe(name, parameters)
    assert file_name(facts, GgufTarget().recipe("int4")) == file
    writer = GGUFWriter(tmp_path / "x.gguf", "openelm")
    facts.set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    found = metadata(tmp_path)
    assert {key: value for key, value in found.items() if key.startswith("general.")} == {
        "general.architecture": "openelm",
        **{f"general.{key}": value for key, value in expected.items()},
    }


def test_the_file_is_called_after_the_model_and_the_type(small_config: OpenELMConfig, export_to: ExportTo) -> None:
    checkpoint = random_checkpoint(small_config)
    checkpoint.source = replace(checkpoint.source, name="OpenELM-1.4M-Instruct")
    assert gguf_path(export_to(checkpoint, "gguf", "int8")).name == "OpenELM-1.4M-Instruct-Q8_0.gguf"


def test_context(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    assert metadata(export_to(small_checkpoint, "gguf", "int8", context=40))["openelm.context_length"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_same_bytes_twice(exported: Exported, small_checkpoint: MemoryCheckpoint, export_to: ExportTo, quant: str) -> None:
    again = export_to(small_checkpoint, "gguf", quant)
    assert gguf_path(again).read_bytes() == gguf_path(exported(quant)).read_bytes()


def test_rows_that_do_not_divide_into_blocks_fall_back(small_config: OpenELMConfig, export_to: ExportTo) -> None:
    config = replace(
        small_config, head_dim=16, num_gqa_groups=1, qkv_multipliers=0.25, ffn_multipliers=(1.0, 0.25, 1.0), ffn_dim_divisor=16
    )
    assert config.layers[2].query_heads * 16 % 32 == 16
    folder = export_to(random_checkpoint(config), "gguf", "int4")
    kinds = {t.name: t.tensor_type for t in GGUFReader(gguf_path(folder)).tensors}
    assert {kinds[f"blk.{i}.attn_output.weight"] for i in range(3)} == {GGMLQuantizationType.F16}
    assert kinds["blk.1.ffn_down.weight"] is GGMLQuantizationType.F16
    assert kinds["blk.2.ffn_down.weight"] is GGMLQuantizationType.Q4_0


def test_llama_cpps_names_for_the_quantizations() -> None:
    target = find_target("gguf")
    for alias, name in {**ALIASES, "Q4_0": "q4_0", "BF16": "bf16"}.items():
        assert target.recipe(alias) == target.recipe(name)
    assert [target.recipe(name).name for name in target.quants] == list(target.quants)
    with pytest.raises(ElmExportError, match=r"--quant q1_0 is not available for gguf; choose int4, int8, fp16, bf16, fp32, q8_0, q4_0"):
        target.recipe("q1_0")


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("share_input_output_layers", "the output head is always the embedding table"),
        ("normalize_qk_projections", "queries and keys always pass a norm"),
        ("ffn_with_glu", "the feed-forward network always has a gate"),
    ],
)
def test_models_that_llama_cpp_cannot_express(
    small_config: OpenELMConfig, export_to: ExportTo, tmp_path: Path, field: str, reason: str
) -> None:
    changes: dict[str, Any] = {field: False}
    checkpoint = random_checkpoint(replace(small_config, **changes))
    with pytest.raises(ElmExportError, match=rf"openelm architecture cannot express this model: {field} is false \({reason}\)"):
        export_to(checkpoint, "gguf", "int4", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
