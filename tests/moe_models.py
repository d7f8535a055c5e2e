"""Mixtures of experts for tests: random weights in shapes that every format takes, with the embedded vocabulary of bytes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.models.olmoe.catalog import TINY_FOLDER
from elmexport.models.olmoe.config import OlmoeConfig
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint

TOKENIZER = TINY_FOLDER / "tokenizer.json"

# 8 rows of the embedding more than there are tokens.
SMALL = OlmoeConfig(
    vocab_size=3080,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts=6,
    num_experts_per_tok=3,
    max_position_embeddings=128,
    eos_token_ids=(0,),
    pad_token_id=1,
)


def random_moe(config: OlmoeConfig = SMALL, *, name: str = "OLMoE-small", seed: int = 0) -> MemoryCheckpoint:
    """Random float32 weights for `config`."""
    checkpoint = random_checkpoint(config, seed, tokenizer_path=TOKENIZER)
    checkpoint.source = replace(checkpoint.source, name=name)
    return checkpoint


def transformers_logits(checkpoint: Checkpoint, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits `[tokens, vocab]` of `ids` `[tokens]` by transformers' own class, in float64 but for the routers' softmax."""
    from transformers import OlmoeForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), checkpoint.config, {name: checkpoint.tensor(name).double() for name in checkpoint.specs})
        model = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    with torch.inference_mode():
        logits: NDArray[np.float64] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


def some_ids(config: OlmoeConfig, tokens: int = 48, seed: int = 1) -> NDArray[np.int64]:
    """Random token ids of a text."""
    return np.random.default_rng(seed).integers(2, config.vocab_size, tokens)
