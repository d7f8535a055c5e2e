"""OLMoE: decoders whose feed-forward networks are mixtures of experts (arXiv:2409.02060)."""

from __future__ import annotations

from importlib.resources import files

from elmexport.models.base import Family
from elmexport.models.olmoe.catalog import known_models
from elmexport.models.olmoe.config import OlmoeConfig

FAMILY = Family(
    name="OLMoE",
    config=OlmoeConfig,
    known_models=known_models,
    tokenizer_words="the byte-level BPE tokenizer of OLMo 1.7",
    tokenizer_repo="allenai/OLMoE-1B-7B-0924",
    published=files(__package__).joinpath("published.toml"),
)
