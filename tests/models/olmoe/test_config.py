"""The configuration: the published file, what transformers writes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.models import config_from_dict, find_model, read_config
from elmexport.models.olmoe.config import OlmoeConfig
from elmexport.weights import Role
from tests.moe_models import SMALL, random_moe

# config.json of allenai/OLMoE-1B-7B-0924.
PUBLISHED: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
    "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rope_scaling": None,
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 50304,
}  # fmt: skip


def test_the_published_model() -> None:
    config = config_from_dict(PUBLISHED)
    known = find_model("OLMoE-1B-7B")
    assert known is not None and config == known.config
    assert config.parameter_count == 6_919_161_856
    assert sum(spec.size for spec in config.weights() if spec.role.is_expert) == 64 * 16 * 3 * 2048 * 1024
    assert (config.bos_token_id, config.eos_token_id, config.dims.tied) == (None, 50279, False)
    assert {name: find_model(name) is not None for name in ("OLMoE-1B-7B-SFT", "allenai/OLMoE-1B-7B-0924-Instruct")} == {
        "OLMoE-1B-7B-SFT": True,
        "allenai/OLMoE-1B-7B-0924-Instruct": True,
    }


def test_it_is_written_as_it_is_read() -> None:
    assert config_from_dict(SMALL.to_dict()) == SMALL
    written = config_from_dict(PUBLISHED).to_dict()
    assert {key: value for key, value in written.items() if key in PUBLISHED} == {
        key: PUBLISHED[key] for key in written if key in PUBLISHED
    }


def test_what_transformers_writes(tmp_path: Path) -> None:
    """Version 5 has `rope_parameters`; transformers reads our file, and we read what it then writes."""
    from transformers import OlmoeForCausalLM

    checkpoint = random_moe()
    save_checkpoint(tmp_path / "ours", SMALL, {name: checkpoint.tensor(name) for name in checkpoint.specs})
    OlmoeForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8"))
    assert read_config(tmp_path / "theirs" / "config.json") == SMALL


def test_experts_share_the_name_of_their_group() -> None:
    """Also where the layer has the expert's number."""
    specs = [spec for spec in SMALL.weights() if spec.role is Role.MOE_EXPERTS_DOWN and spec.layer == 2]
    assert [spec.expert for spec in specs] == list(range(SMALL.num_experts))
    assert {spec.group for spec in specs} == {"model.layers.2.mlp.experts.*.down_proj.weight"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip_qkv": 8.0}, "clip_qkv is '8.0'; elmexport exports OLMoE models with clip_qkv None only"),
        ({"attention_bias": True}, "attention_bias is 'True'"),
        ({"norm_topk_prob": True}, "norm_topk_prob is 'True'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is 'True'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}, "rope_scaling is"),
        ({"rope_parameters": 3}, "rope_parameters is '3'; it must be an object"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok is 65, of 64 experts"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide"),
        ({"num_attention_heads": 3}, "hidden_size is 2048, num_attention_heads 3"),
        ({"num_experts": None}, "lacks num_experts"),
        ({"num_experts": True}, "num_experts is True; it must be a whole number above 0"),
        ({"rope_theta": -1}, "rope_theta is -1; it must be a number above 0"),
        ({"eos_token_id": 60000}, "eos_token_id is 60000; it must lie in 0..50303"),
        ({"eos_token_id": []}, "eos_token_id is an empty list"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ElmExportError, match=rf"^config\.json: .*{words}".replace("[", r"\[")):
        OlmoeConfig.from_dict(PUBLISHED | change)
