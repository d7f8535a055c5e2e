"""The contract of a runtime: an artifact opened in an engine, with a KV cache, that turns token ids into logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError


class Runtime(ABC):
    """One open model with one sequence in its cache.

    Subclasses implement `_forward` and set `name`, `vocab_size` and `context` in `__init__`.
    """

    name: str  # the engine, "onnxruntime"
    vocab_size: int
    context: int  # tokens that the cache can hold

    def __init__(self) -> None:
        self.length = 0  # tokens now in the cache

    def logits(self, ids: Sequence[int] | NDArray[np.integer], position: int = 0, *, last_only: bool = False) -> NDArray[np.float32]:
        """Feed `ids` at `position` and return float32 logits `[tokens, vocab]`, or `[1, vocab]` of the last with `last_only`.

        The cache keeps what was fed before `position` and forgets what came after: position 0 starts a new sequence, position n after n
        tokens continues, and a smaller one goes back to share a prefix.

        Raises:
            ElmExportError: no ids, an id outside the vocabulary, a gap after what was fed, or more tokens than the cache holds.
        """
        tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
        if not len(tokens):
            raise ElmExportError("no token ids were given; logits need at least one")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ElmExportError(
                f"token id {int(tokens[(tokens < 0) | (tokens >= self.vocab_size)][0])} is outside the vocabulary, 0 to {self.vocab_size - 1}"
            )
        if not 0 <= position <= self.length:
            raise ElmExportError(f"position is {position}, but the cache holds {self.length} tokens; feed the tokens in between first")
        end = position + len(tokens)
        if end > self.context:
            raise ElmExportError(
                f"{len(tokens)} tokens at position {position} need a context of {end}; this artifact holds {self.context}: export it with --context {end} or feed fewer"
            )
        self.length = position  # should the engine fail, what it may have overwritten counts as forgotten
        result = self._forward(tokens, position, last_only)
        self.length = end
        return result

    @abstractmethod
    def _forward(self, ids: NDArray[np.int64], position: int, last_only: bool) -> NDArray[np.float32]:
        """`logits`, arguments already checked."""

    def close(self) -> None:  # noqa: B027  (optional: most engines free what they hold with their last reference)
        """Release the engine's memory."""
