"""Texts that ship, each for one use, and the user's own calibration text, cut into windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig

Use = Literal["calibration", "weighting", "self-check", "choice", "held-out"]
"""What a bundled text is for. No two have a sentence in common, and none has one with the evaluation's (`elmexport.evaluation`):

- "calibration": codes are fitted to it; docs/calibration.md says what it holds;
- "weighting": weights the errors of "mse"; the opening of "The Spy" (J. F. Cooper, 1821), in the public domain;
- "self-check": the finished artifact is compared with the model on it;
- "choice": says what each matrix costs, and so which scheme it gets;
- "held-out": measures what codes that were fitted, or bits that were chosen, lose.

The last three were written for this project.
"""


@dataclass(frozen=True)
class Sample:
    """Calibration text in windows: `ids` `[windows, window]` int64, every row after a BOS; `words` says what it is."""

    ids: NDArray[np.int64]
    words: str

    @property
    def tokens(self) -> int:
        return int(self.ids.size)

    @property
    def window(self) -> int:
        return int(self.ids.shape[1])

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the ids as little-endian int64, row after row, and their shape: it covers the text, the tokenizer and what was chosen."""
        return hashlib.sha256(f"{self.ids.shape}".encode() + self.ids.astype("<i8").tobytes()).hexdigest()


def bundled_text(use: Use) -> str:
    """Read the bundled text for `use`."""
    return files("calibration").joinpath("texts", f"{use}.txt").read_text(encoding="utf-8")


def bundled_words(use: Use) -> str:
    """Describe the bundled text for `use` in manifests and reports."""
    return f"bundled {use} text"


def read_text(path: Path, option: str = "--text") -> str:
    """Read a text file, which `option` named.

    Raises:
        ElmExportError: it cannot be read, is not UTF-8, or holds nothing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}; {option} takes text files") from None
    except UnicodeDecodeError as error:
        raise ElmExportError(f"{path} is not UTF-8 text (byte {error.start}); {option} takes text files: save it as UTF-8") from None
    if not text.strip():
        raise ElmExportError(f"{path} is empty; {option} takes text like what the model will read in use")
    return text


def sample_windows(tokenizer: Tokenizer, texts: Sequence[str], words: str, *, tokens: int, window: int, seed: int = 0) -> Sample:
    """Sample about `tokens` tokens in windows of `window`: BOS, where the model has one, then text.

    The texts' tokens, one text after the other, are cut into pieces that do not overlap. If there are more than enough, as many as fill
    `tokens` (rounded up to whole windows) are chosen by `seed`, spread evenly: one from each equal part of the whole. If there are fewer,
    all are taken; a text shorter than a window makes one shorter window.

    Raises:
        ElmExportError: texts that give no token.
    """
    ids = np.concatenate([np.array(tokenizer.encode(text, bos=False), dtype=np.int64) for text in texts])
    prefix = np.array([tokenizer.special.prefix], dtype=np.int64)
    length = min(window - prefix.size, len(ids))
    if length < 1:
        raise ElmExportError(
            f"the calibration text holds {len(ids)} tokens, for windows of {window}, BOS included; give more text with --text"
        )
    pieces = len(ids) // length
    count = min(-(-tokens // window), pieces)
    edges = np.arange(count + 1) * pieces // count
    chosen = np.random.Generator(np.random.PCG64(seed)).integers(edges[:-1], edges[1:])
    rows = ids[: pieces * length].reshape(pieces, length)[chosen]
    return Sample(np.concatenate((np.repeat(prefix, count, axis=0), rows), axis=1), words)


def random_windows(vocab_size: int, bos_id: int | None, *, tokens: int, window: int, seed: int = 0) -> Sample:
    """Draw a sample of ids uniformly, for random weights without a tokenizer."""
    count = -(-tokens // window)
    ids = np.random.Generator(np.random.PCG64(seed)).integers(0, vocab_size, (count, window))
    if bos_id is not None:
        ids[:, 0] = bos_id
    return Sample(ids, "pseudo-random ids")


def bundled_sample(tokenizer: Tokenizer | None, config: ModelConfig, use: Use, *, tokens: int, window: int) -> Sample:
    """Sample the bundled text for `use`, see `sample_windows`; without a tokenizer, ids drawn uniformly, others for each use."""
    if tokenizer is None:
        return random_windows(config.dims.vocab_size, config.bos_token_id, tokens=tokens, window=window, seed=_seed(use))
    return sample_windows(tokenizer, [bundled_text(use)], bundled_words(use), tokens=tokens, window=window)


def sample_ids(tokenizer: Tokenizer | None, vocab_size: int, use: Use, count: int) -> tuple[NDArray[np.int64], str]:
    """Take `count` token ids to feed a model, int64; returns what they are in words, too.

    The start of the bundled text for `use` after BOS; without a tokenizer, ids drawn uniformly with a fixed seed.
    """
    if tokenizer is None:
        return np.random.Generator(np.random.PCG64(_seed(use))).integers(0, vocab_size, count), "pseudo-random ids"
    return np.array(tokenizer.encode(bundled_text(use))[:count], dtype=np.int64), bundled_words(use)


def _seed(use: Use) -> int:
    return get_args(Use).index(use)
