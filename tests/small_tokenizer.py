"""A small vocabulary, trained where a test needs one."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import sentencepiece


def train_tokenizer(folder: Path) -> None:
    """Write `tokenizer.model` and `tokenizer.vocab` into `folder`: BPE of Llama's kind (byte fallback, BOS 1, EOS 2) with 512 pieces."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(files("calibration") / "texts" / "weighting.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
