"""The OLMoE models that `elmexport` knows by name: the three published in September 2024 and the embedded `tiny-moe`."""

from __future__ import annotations

from pathlib import Path

from elmexport.models.base import KnownModel
from elmexport.models.olmoe.config import OlmoeConfig

TINY_FOLDER = Path(__file__).parent / "tiny"

_PUBLISHED = OlmoeConfig(
    vocab_size=50304,
    hidden_size=2048,
    intermediate_size=1024,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=16,
    num_experts=64,
    num_experts_per_tok=8,
    max_position_embeddings=4096,
    eos_token_ids=(50279,),
    pad_token_id=1,
)


_TINY = OlmoeConfig(
    vocab_size=3072,
    hidden_size=256,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    eos_token_ids=(0,),
    pad_token_id=1,
)


def known_models() -> tuple[KnownModel, ...]:
    """`tiny-moe`, then the published model and what was made of it."""
    models = [KnownModel("tiny-moe", "OLMoE-tiny", None, _TINY, TINY_FOLDER)]
    for suffix in ("", "-SFT", "-Instruct"):
        name = f"OLMoE-1B-7B-0924{suffix}"
        models.append(KnownModel(f"OLMoE-1B-7B{suffix}", name, f"allenai/{name}", _PUBLISHED))
    return tuple(models)
