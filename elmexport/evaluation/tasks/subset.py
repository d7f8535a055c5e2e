"""Subset of a task's documents for `--limit N`, the same for every artifact."""

from __future__ import annotations

import hashlib

import numpy as np


def subset(name: str, count: int, limit: int | None, seed: int) -> list[int]:
    """Sorted ids, below `count`, of the documents of the task `name`: the first `limit` of a permutation drawn from the name and `seed`.

    A larger limit holds all documents of a smaller one. None: all.
    """
    if limit is None or limit >= count:
        return list(range(count))
    digest = hashlib.sha256(f"{name}\n{seed}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return sorted(int(i) for i in generator.permutation(count)[:limit])
