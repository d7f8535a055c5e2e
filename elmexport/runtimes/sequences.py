"""The contract of several sequences that one engine holds at once, each with a cache of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Sequences(ABC):
    """Several sequences in an engine, by number from 0, empty at first. A `with` block frees what they hold."""

    @abstractmethod
    def read(self, number: int, ids: Sequence[int], position: int) -> NDArray[np.float32]:
        """Feed `ids` at `position` of one sequence; logits `[vocab]` after the last, the very numbers that `Runtime.logits` gives."""

    @abstractmethod
    def step(self, numbers: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """Feed each of the sequences `numbers` one token at its position, all at once; logits `[sequences, vocab]`."""

    def close(self) -> None:  # noqa: B027  (optional)
        """Free what the sequences hold."""

    def __enter__(self) -> Sequences:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
