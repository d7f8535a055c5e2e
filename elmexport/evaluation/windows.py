"""Windows of the text for perplexity and KL divergence, cut as llama.cpp's `llama-perplexity` does it.

Consecutive windows of equal length, the first token of each replaced by BOS where the model has one, what does not fill a window left out. The model reads each
window from its beginning; only predictions from the middle of the window on are counted, so that every counted one has seen some text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.text import read_text, sample_ids
from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.errors import ElmExportError

WINDOW = 512  # tokens, or the context where that is smaller
DEFAULT_TOKENS = 8192  # of a text that is longer
MIN_WINDOW = 16


@dataclass(frozen=True)
class Windows:
    """Windows of a text: `ids` int64 `[windows, length]`; `text` says what they are, in words."""

    ids: NDArray[np.int64]
    text: str

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])

    @property
    def first(self) -> int:
        """Position of the first prediction that counts; the last is that of the window's last token, from the one before."""
        return self.length // 2

    @property
    def counted(self) -> int:
        """Predictions that count, in all windows."""
        return int(len(self.ids) * (self.length - 1 - self.first))

    @property
    def hash(self) -> str:
        """SHA-256 of the token ids and the length of the windows."""
        return hashlib.sha256(f"{self.ids.shape} ".encode() + self.ids.astype("<i8").tobytes()).hexdigest()


def text_windows(
    tokenizer: Tokenizer | None, vocab_size: int, context: int, *, path: Path | None = None, tokens: int | None = None
) -> Windows:
    """The windows of the text file `path` (the bundled text where None), at most `tokens` tokens of it (8192 where None).

    `context` is the smallest of the models that will read them. Without a tokenizer, pseudo-random ids stand in for the bundled text.

    Raises:
        ElmExportError: a file that is no text, no tokenizer to read it with, or too few tokens for a window.
    """
    limit = DEFAULT_TOKENS if tokens is None else tokens
    if path is None:
        name = "bundled prose"
        if tokenizer is None:
            ids, name = sample_ids(None, vocab_size, "held-out", min(limit, 4 * WINDOW))
        else:
            ids = np.array(tokenizer.encode(evaluation_text()), dtype=np.int64)
    else:
        if tokenizer is None:
            raise ElmExportError(f"reading {path} needs the model's tokenizer; pass --tokenizer PATH")
        name = path.name
        ids = np.array(tokenizer.encode(read_text(path)), dtype=np.int64)
    total = len(ids)
    length = min(WINDOW, context, limit, total)
    if length < MIN_WINDOW:
        raise ElmExportError(
            f"the text pass has windows of {length} tokens, at least {MIN_WINDOW} are needed ({name} has {total} tokens, the context {context}, "
            f"the limit is {limit}); give a longer text or a larger limit"
        )
    count = min(limit, total) // length
    windows = ids[: count * length].reshape(count, length).copy()
    for bos in () if tokenizer is None else tokenizer.special.prefix:
        windows[:, 0] = bos
    used = windows.size
    return Windows(windows, name if total - used < length else f"{name}, the first {used} of {total} tokens")


def evaluation_text() -> str:
    """The bundled text: excerpts of "The First Men in the Moon" (H. G. Wells, 1901), "A Connecticut Yankee in King Arthur's Court" (Mark Twain,
    1889) and "Moll Flanders" (D. Defoe, 1722). In the public domain, none of them among the books that `tiny` and `tiny-moe` were trained on, nor among
    those that calibration's texts come from.
    """
    return files(__package__).joinpath("texts", "prose.txt").read_text(encoding="utf-8")
