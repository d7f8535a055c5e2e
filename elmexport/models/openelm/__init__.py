"""OpenELM: decoders whose layers differ in query heads, KV heads and feed-forward width (layer-wise scaling, arXiv:2404.14619)."""

from __future__ import annotations

from importlib.resources import files

from elmexport.models.base import Family
from elmexport.models.openelm.catalog import known_models
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.models.openelm.names import from_corenet

FAMILY = Family(
    name="OpenELM",
    config=OpenELMConfig,
    known_models=known_models,
    tokenizer_words="the Llama 2 tokenizer",
    tokenizer_repo="meta-llama/Llama-2-7b-hf",  # every published model was trained with its vocabulary; behind Meta's licence
    published=files(__package__).joinpath("published.toml"),
    trained_name=from_corenet,
)
