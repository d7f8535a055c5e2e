"""The configuration: per-layer dimensions against Apple's four files (facts below), its options, its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elmexport.errors import ElmExportError
from elmexport.models import config_from_dict, read_config
from elmexport.models.base import ModelConfig
from elmexport.models.openelm.config import OpenELMConfig, make_divisible
from elmexport.weights import Role

# From the config.json of the published models: layers, model_dim, head_dim, parameters, num_query_heads (four to a KV head) as (heads, layers)
# runs, and ffn_multipliers.
PUBLISHED: dict[str, dict[str, Any]] = {
    "270M": {
        "shape": (16, 1280, 64),
        "parameters": 271_527_168,
        "heads": [(12, 5), (16, 7), (20, 4)],
        "ffn": [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0],
    },
    "450M": {
        "shape": (20, 1536, 64),
        "parameters": 457_179_136,
        "heads": [(12, 3), (16, 7), (20, 6), (24, 4)],
        "ffn": [0.5, 0.68, 0.87, 1.05, 1.24, 1.42, 1.61, 1.79, 1.97, 2.16, 2.34, 2.53, 2.71, 2.89, 3.08, 3.26, 3.45, 3.63, 3.82, 4.0],
    },
    "1_1B": {
        "shape": (28, 2048, 64),
        "parameters": 1_079_891_456,
        "heads": [(16, 3), (20, 7), (24, 8), (28, 6), (32, 4)],
        "ffn": [0.5, 0.63, 0.76, 0.89, 1.02, 1.15, 1.28, 1.41, 1.54, 1.67, 1.8, 1.93, 2.06, 2.19,
                2.31, 2.44, 2.57, 2.7, 2.83, 2.96, 3.09, 3.22, 3.35, 3.48, 3.61, 3.74, 3.87, 4.0],
    },
    "3B": {
        "shape": (36, 3072, 128),
        "parameters": 3_036_647_424,
        "heads": [(12, 4), (16, 14), (20, 12), (24, 6)],
        "ffn": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2,
                2.3, 2.4, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 3.6, 3.7, 3.8, 3.9, 4.0],
    },
}  # fmt: skip


def apple(size: str, *, ffn: Any = None) -> dict[str, Any]:
    """The published file's content; `ffn_multipliers` are its list unless given."""
    facts = PUBLISHED[size]
    layers, model_dim, head_dim = facts["shape"]
    heads = [count for count, times in facts["heads"] for _ in range(times)]
    return {
        "activation_fn_name": "swish", "architectures": ["OpenELMForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "ffn_dim_divisor": 256, "ffn_multipliers": ffn or facts["ffn"], "ffn_with_glu": True, "head_dim": head_dim,
        "initializer_range": 0.02, "max_context_length": 2048, "model_dim": model_dim, "model_type": "openelm",
        "normalization_layer_name": "rms_norm", "normalize_qk_projections": True, "num_gqa_groups": 4,
        "num_kv_heads": [count // 4 for count in heads], "num_query_heads": heads, "num_transformer_layers": layers,
        "qkv_multipliers": [0.5, 1.0], "rope_freq_constant": 10000, "rope_max_length": 4096, "share_input_output_layers": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.39.3", "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("interpolated", [False, True])
def test_published_sizes(size: str, interpolated: bool) -> None:
    facts = PUBLISHED[size]
    config = OpenELMConfig.from_dict(apple(size, ffn=[0.5, 4.0] if interpolated else None))
    assert config.parameter_count == facts["parameters"]
    assert [layer.query_heads for layer in config.layers] == [count for count, times in facts["heads"] for _ in range(times)]
    assert config.to_dict()["ffn_multipliers"] == facts["ffn"]
    published = apple(size)
    assert {key: value for key, value in config.to_dict().items() if key in published} == {
        key: value for key, value in published.items() if key not in ("torch_dtype", "transformers_version")
    }


def test_270m_by_hand() -> None:
    """Layer 0 of 270M: 12 + 2 * 3 heads of 64; FFN 1280 * 0.5 = 640 rounded to 768 (multiples of 256, halves up)."""
    config = OpenELMConfig.from_dict(apple("270M"))
    shapes = {spec.name: spec.shape for spec in config.weights()}
    assert shapes["transformer.layers.0.attn.qkv_proj.weight"] == (1152, 1280)
    assert shapes["transformer.layers.0.attn.out_proj.weight"] == (1280, 768)
    assert shapes["transformer.layers.0.ffn.proj_1.weight"] == (1536, 1280)
    assert shapes["transformer.layers.0.ffn.proj_2.weight"] == (1280, 768)
    assert shapes["transformer.layers.0.attn.q_norm.weight"] == (64,)


def small(**changes: Any) -> OpenELMConfig:
    return OpenELMConfig.from_dict({"num_transformer_layers": 4, "model_dim": 256, "head_dim": 32, "vocab_size": 100, **changes})


def test_defaults_are_those_of_apples_class() -> None:
    """12 layers of 2048, 16 heads of 128, no GQA, FFN 4, untied, no q/k norm."""
    config = OpenELMConfig.from_dict({"num_transformer_layers": 12, "model_dim": 2048, "head_dim": 128})
    assert config == OpenELMConfig()
    assert len(config.layers) == 12 and {(layer.query_heads, layer.kv_heads, layer.ffn_dim) for layer in config.layers} == {(16, 16, 8192)}
    assert not config.share_input_output_layers and not config.normalize_qk_projections and config.ffn_with_glu


def test_sizes_are_never_filled_in() -> None:
    """As CoreNet's conversion to MLX leaves the file: the model's name and two sizes."""
    with pytest.raises(
        ElmExportError, match=r"^c: lacks num_transformer_layers, model_dim, head_dim, num_gqa_groups, qkv_multipliers, ffn_multip"
    ):
        OpenELMConfig.from_dict({"model_name": "OpenELM-270M", "vocab_size": 32128, "max_context_length": 2048}, where="c")
    with pytest.raises(ElmExportError, match=r"use the config.json of the published model, that of OpenELM-270M, or"):
        OpenELMConfig.from_dict({"model_name": "OpenELM-270M"})
    for missing in ("num_transformer_layers", "model_dim", "head_dim"):
        with pytest.raises(ElmExportError, match=rf"config.json: lacks {missing}"):
            OpenELMConfig.from_dict({key: value for key, value in OpenELMConfig().to_dict().items() if key != missing})


def test_multipliers_uniform_and_per_layer() -> None:
    assert {(layer.query_heads, layer.ffn_dim) for layer in small(qkv_multipliers=0.5, ffn_multipliers=2).layers} == {(4, 512)}
    per_layer = small(qkv_multipliers=[0.5, 1.0, 1.0, 2.0], ffn_multipliers=[1, 2, 3, 4])
    assert [layer.query_heads for layer in per_layer.layers] == [4, 8, 8, 16]
    assert [layer.ffn_dim for layer in per_layer.layers] == [256, 512, 768, 1024]
    with pytest.raises(ElmExportError, match=r"ffn_multipliers has 3 entries; allowed: .* one for each of the 4 layers"):
        small(ffn_multipliers=[1, 2, 3])


def test_options_change_the_tensors() -> None:
    tied = small(share_input_output_layers=True)
    assert [spec.name for spec in small().weights() if spec.role is Role.LM_HEAD] == ["lm_head.weight"]
    assert small().parameter_count - tied.parameter_count == 100 * 256
    assert not [spec for spec in tied.weights() if "q_norm" in spec.name or "k_norm" in spec.name]
    assert small(normalize_qk_projections=True, share_input_output_layers=True).parameter_count - tied.parameter_count == 4 * 2 * 32
    shapes = {spec.name: spec.shape for spec in small(ffn_with_glu=False).weights()}
    assert shapes["transformer.layers.0.ffn.proj_1.weight"] == (1024, 256)


@given(
    layers=st.integers(1, 48),
    model_dim=st.sampled_from([256, 1280, 1536, 2048, 3072]),
    first=st.integers(1, 800),
    last=st.integers(1, 800),
    heads=st.integers(1, 4),
)
def test_interpolation_rounds_as_numpy_does(layers: int, model_dim: int, first: int, last: int, heads: int) -> None:
    """Apple's class takes numpy.linspace and rounds to two decimals."""
    ends = (first / 100, last / 100)
    config = OpenELMConfig.from_dict(
        {"num_transformer_layers": layers, "model_dim": model_dim, "head_dim": 64, "num_gqa_groups": heads,
         "qkv_multipliers": list(ends), "ffn_multipliers": list(ends)}
    )  # fmt: skip
    expected = [round(float(v), 2) for v in np.linspace(*ends, num=layers, dtype=float)]
    assert config.to_dict()["ffn_multipliers"] == expected
    assert [layer.ffn_dim for layer in config.layers] == [make_divisible(model_dim * m, 256) for m in expected]
    assert [layer.query_heads * 64 for layer in config.layers] == [make_divisible(model_dim * m, 64 * heads) for m in expected]


@given(value=st.floats(1, 1e5), divisor=st.integers(1, 1024))
def test_make_divisible(value: float, divisor: int) -> None:
    result = make_divisible(value, divisor)
    assert result % divisor == 0 and result >= divisor and result >= 0.9 * value
    assert result <= max(divisor, value + divisor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; elmexport exports 'openelm'"),
        ({"activation_fn_name": "gelu"}, "activation_fn_name is 'gelu'; elmexport supports swish and silu"),
        ({"normalization_layer_name": "layer_norm"}, "normalization_layer_name is 'layer_norm'; elmexport supports 'rms_norm'"),
        ({"model_dim": 0}, "model_dim is 0; it must be a whole number above 0"),
        ({"num_transformer_layers": 10**9}, "num_transformer_layers is 1000000000; it must be at most 1000"),
        ({"ffn_multipliers": 1e300}, r"ffn_multipliers holds 1e\+300; multipliers are numbers above 0, up to 1000"),
        ({"initializer_range": [0.02]}, r"initializer_range is \[0.02\]; it must be a number"),
        ({"head_dim": "64"}, "head_dim is '64'"),
        ({"head_dim": 63}, "head_dim is 63; rotary embeddings need an even number"),
        ({"ffn_with_glu": 1}, "ffn_with_glu is 1; it must be true or false"),
        ({"qkv_multipliers": [0.5, -1]}, "qkv_multipliers holds -1; multipliers are numbers above 0"),
        ({"ffn_multipliers": float("nan")}, "ffn_multipliers holds nan; multipliers are numbers above 0"),  # JSON as Python reads it
        ({"ffn_multipliers": float("inf")}, "ffn_multipliers holds inf; multipliers are numbers above 0"),
        ({"rope_freq_constant": 0}, "rope_freq_constant is 0"),
        ({"rope_freq_constant": float("nan")}, "rope_freq_constant is nan"),
        ({"rope_freq_constant": 1e300}, r"rope_freq_constant is 1e\+300; it must be at most 1e\+30"),
        ({"rope_freq_constant": 10**400}, r"it must be at most 1e\+30"),
        ({"eos_token_id": 32000}, r"eos_token_id is 32000; it must lie in 0..31999"),
        ({"eos_token_id": [2, "3"]}, r"eos_token_id is '3'; it must lie in 0..31999"),
        ({"eos_token_id": []}, r"eos_token_id is an empty list; name the token that ends a text"),
        ({"bos_token_id": -1}, r"bos_token_id is -1; it must lie in 0..31999"),
    ],
)
def test_unusable_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        config_from_dict(apple("270M") | change)


@pytest.mark.parametrize("key", ["num_query_heads", "num_kv_heads"])
def test_lists_that_contradict_name_the_layer(key: str) -> None:
    data = apple("270M")
    data[key][7] += 1
    with pytest.raises(ElmExportError, match=rf"{key}\[7\] is \d+, but layer 7 has \d+ by qkv_multipliers"):
        OpenELMConfig.from_dict(data)
    data[key] = data[key][:-1]
    with pytest.raises(ElmExportError, match=f"{key} lists 15 layers, num_transformer_layers says 16"):
        OpenELMConfig.from_dict(data)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ElmExportError, match=r"no such file; a checkpoint folder holds config.json"):
        read_config(path)
    path.write_text("{")
    with pytest.raises(ElmExportError, match="not valid JSON"):
        read_config(path)
    path.write_text("[]")
    with pytest.raises(ElmExportError, match="holds a JSON list, not an object"):
        read_config(path)
    path.write_text(json.dumps(apple("3B")))
    assert read_config(path).parameter_count == 3_036_647_424


def test_several_tokens_that_end_a_text(tmp_path: Path) -> None:
    """A number or a list in config.json, and what generation_config.json adds; null for BOS says that there is none."""

    def read(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(apple("270M") | config), encoding="utf-8")
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        return read_config(tmp_path / "config.json")

    assert read({}).eos_token_ids == (2,) and read({}).to_dict()["eos_token_id"] == 2
    assert read({}, {"eos_token_id": 2}).to_dict() == read({}).to_dict()
    assert read({"eos_token_id": [7, 2]}).eos_token_id == 7
    both = read({"eos_token_id": 2}, {"eos_token_id": [2, 9]})
    assert both.eos_token_ids == (2, 9) and both.to_dict()["eos_token_id"] == [2, 9]
    assert config_from_dict(both.to_dict()) == both
    assert read({"eos_token_id": None}, {"eos_token_id": 9}).eos_token_ids == (9,)
    assert read({"bos_token_id": None}).bos_token_id is None and read({"bos_token_id": None}).to_dict()["bos_token_id"] is None
    with pytest.raises(ElmExportError, match=r"generation_config.json: not valid JSON"):
        (tmp_path / "generation_config.json").write_text("{")
        read_config(tmp_path / "config.json")
