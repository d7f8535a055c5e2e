"""A model that costs nothing: the next token's distribution depends on the last token and its position, by a table of random numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elmexport.runtimes.base import Runtime


class TableRuntime(Runtime):
    """`noise` is what quantization would be: another random table, added."""

    name = "table"

    def __init__(self, vocab_size: int = 50, context: int = 64, *, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.context = vocab_size, context
        generator = np.random.Generator(np.random.PCG64(seed))
        shape = (context, vocab_size, vocab_size)
        self.table = (2 * generator.standard_normal(shape) + noise * generator.standard_normal(shape)).astype(np.float32)
        self.calls = 0

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        self.calls += 1
        rows: NDArray[np.float32] = self.table[np.arange(position, position + len(ids)), ids][-last:]
        return rows
