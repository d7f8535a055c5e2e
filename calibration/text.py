"""The bundled text, public-domain prose: what an export reads to measure a model and to check itself."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from elmexport.checkpoint.tokenizer import Tokenizer

# The opening of "The Spy" (J. F. Cooper, 1821): in the public domain, and not among the books that `tiny` was trained on.
BUNDLED = "prose.txt"


def bundled_text() -> str:
    return files("calibration").joinpath("texts", BUNDLED).read_text(encoding="utf-8")


def sample_ids(tokenizer: Tokenizer | None, vocab_size: int, count: int) -> tuple[NDArray[np.int64], str]:
    """`count` token ids to feed a model, int64, and what they are in words.

    The start of the bundled text after BOS; without a tokenizer, ids drawn uniformly with a fixed seed.
    """
    if tokenizer is None:
        return np.random.Generator(np.random.PCG64(0)).integers(0, vocab_size, count), "pseudo-random ids"
    return np.array(tokenizer.encode(bundled_text())[:count], dtype=np.int64), "bundled prose"
