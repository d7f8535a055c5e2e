"""Batches of continuations that are read together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

TOKENS = 512  # of one batch, padding included; bounds the memory of its logits and copied caches
FULL_CACHES = 4  # as large as these are those of a batch of sequences, at most
PADDING = 16  # tokens by which a row may be padded: a call of its own would cost about as much


def batches(lengths: Sequence[int], *, rows: int | None = None, tokens: int | None = None, padding: int = PADDING) -> Iterator[list[int]]:
    """Group indices of `lengths` into batches of at most `rows`, longest first.

    Each, padded to its longest, has at most `tokens` (`TOKENS`) tokens.
    A sequence that is longer than `tokens` is a group by itself.
    """
    tokens = TOKENS if tokens is None else tokens
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[group[0]] if group else 0
        if group and (len(group) == rows or (len(group) + 1) * longest > tokens or longest - lengths[index] > padding):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def copies(context: int, position: int) -> int:
    """Number of rows of a batch whose caches are copies of a prefix of `position` tokens: together about as large as two full caches."""
    return max(1, 2 * context // (position + 1))


def padded(sequences: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Pad to `[rows, tokens of the longest]`, zeros on the right."""
    result = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in zip(result, sequences, strict=True):
        row[: len(sequence)] = sequence
    return result


def in_padded_batches(
    continuations: Sequence[NDArray[np.int64]], context: int, position: int, read: Callable[[NDArray[np.int64]], NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Read continuations of the first `position` tokens in padded batches.

    `read` gives logits `[rows, tokens, vocab]` of padded ids `[rows, tokens]`.
    """
    results: dict[int, NDArray[np.float32]] = {}
    for group in batches([len(ids) for ids in continuations], rows=copies(context, position)):
        logits = read(padded([continuations[index] for index in group]))
        results |= {index: row[: len(continuations[index])] for index, row in zip(group, logits, strict=True)}
    return [results[index] for index in range(len(continuations))]
