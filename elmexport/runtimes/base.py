"""The contract of a runtime: an artifact opened in an engine, with a KV cache, that turns token ids into logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.runtimes.sequences import Sequences

TokenIds = Sequence[int] | NDArray[np.integer]
CHECK_TOKENS = 128  # that the self-check reads: what a runtime opened for it has to hold, where its cache may be shorter than the context


class Runtime(ABC):
    """One open model with one sequence in its cache.

    Subclasses implement `_forward`, and may implement `_continuations`; they set `name`, `vocab_size` and `context` in `__init__`.
    """

    name: str  # the engine, "onnxruntime"
    vocab_size: int
    context: int  # tokens that the cache can hold
    step_tokens: int = 1  # the fewest that are rounded as any larger number is; generation feeds as many, padded
    smooth: bool = False  # whether tiny differences stay tiny: activations that are rounded to few bits make them jump
    batch_tokens: int = 0  # that the `sequences` of a batch may have together; 0: the engine decodes one sequence at a time
    only_greedy: str | None = None  # why there are no logits, only the most likely token; None where there are

    def __init__(self) -> None:
        self.length = 0  # tokens now in the cache

    def logits(self, ids: TokenIds, position: int = 0, *, last: int | None = None) -> NDArray[np.float32]:
        """Feed `ids` at `position` and return float32 logits `[tokens, vocab]`, or `[last, vocab]` of the last `last` tokens.

        The cache keeps what was fed before `position` and forgets what came after: position 0 starts a new sequence, position n after n
        tokens continues, and a smaller one goes back to share a prefix.

        Raises:
            ElmExportError: no ids, an id outside the vocabulary, a gap after what was fed, more tokens than the cache holds, or `last`
                outside 1 to the number of ids; or `only_greedy`.
        """
        self._check_logits()
        tokens = self._checked(ids, position)
        if last is not None and not 1 <= last <= len(tokens):
            raise ElmExportError(f"logits of the last {last} tokens are asked for, of {len(tokens)} fed; give last from 1 to {len(tokens)}")
        self.length = position  # should the engine fail, what it may have overwritten counts as forgotten
        result = self._forward(tokens, position, len(tokens) if last is None else last)
        self.length = position + len(tokens)
        return result

    def greedy(self, ids: TokenIds, position: int = 0) -> int:
        """Feed `ids` at `position`, as `logits` does, and return the most likely token after them; the first of several.

        Raises:
            ElmExportError: as `logits`; artifacts that give no logits give this.
        """
        tokens = self._checked(ids, position)
        self.length = position
        token = self._greedy(tokens, position)
        self.length = position + len(tokens)
        return token

    def continuations(self, continuations: Sequence[TokenIds], position: int) -> list[NDArray[np.float32]]:
        """Float32 logits `[tokens, vocab]` of each continuation, read as if it alone followed the first `position` tokens of the cache.

        Afterwards the cache holds exactly those `position` tokens. The results are what `logits` gives for each alone, up to the
        engine's rounding; engines may compute them in batches.

        Raises:
            ElmExportError: a continuation that `logits` would refuse at `position`; none is then computed.
        """
        self._check_logits()
        self._check_position(position)
        checked = [self._checked(ids, position) for ids in continuations]
        self.length = position
        results = self._continuations(checked, position) if checked else []
        self.length = position
        return results

    def sequences(self, lengths: Sequence[int]) -> Sequences:
        """Sequences of up to `lengths` tokens, together at most `batch_tokens`, to decode at once; `logits` starts anew after them.

        Only where `batch_tokens` is above 0.
        """
        self.length = 0
        return self._sequences(lengths)

    def check_ids(self, ids: TokenIds) -> NDArray[np.int64]:
        """`ids` as an array.

        Raises:
            ElmExportError: no ids, or an id outside the vocabulary.
        """
        tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
        if not len(tokens):
            raise ElmExportError("no token ids were given; logits need at least one")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ElmExportError(
                f"token id {int(tokens[(tokens < 0) | (tokens >= self.vocab_size)][0])} is outside the vocabulary, 0 to {self.vocab_size - 1}"
            )
        return tokens

    def _check_logits(self) -> None:
        if self.only_greedy is not None:
            raise ElmExportError(self.only_greedy)

    def _checked(self, ids: TokenIds, position: int) -> NDArray[np.int64]:
        tokens = self.check_ids(ids)
        self._check_position(position)
        end = position + len(tokens)
        if end > self.context:
            raise ElmExportError(
                f"{len(tokens)} tokens at position {position} need a context of {end}; this artifact holds {self.context}: export it with --context {end} or feed fewer"
            )
        return tokens

    def _check_position(self, position: int) -> None:
        if not 0 <= position <= self.length:
            raise ElmExportError(f"position is {position}, but the cache holds {self.length} tokens; feed the tokens in between first")

    @abstractmethod
    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        """`logits`, arguments already checked and `last` between 1 and the number of ids."""

    def _greedy(self, ids: NDArray[np.int64], position: int) -> int:
        """`greedy`, arguments already checked."""
        return int(self._forward(ids, position, 1)[-1].argmax())

    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        """`continuations`, arguments already checked, at least one; engines that can batch override it."""
        return [self._forward(ids, position, len(ids)) for ids in continuations]

    def _sequences(self, lengths: Sequence[int]) -> Sequences:
        """`sequences`; engines with `batch_tokens` override it."""
        raise NotImplementedError

    def prepare_generation(self) -> None:  # noqa: B027  (optional)
        """Set up to generate texts, before any is fed: as fast as the engine is, and rounding alike however many tokens are read at once."""

    def close(self) -> None:  # noqa: B027  (optional: most engines free what they hold with their last reference)
        """Release the engine's memory."""
