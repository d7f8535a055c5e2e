"""Memory read bandwidth of this machine: python -m elmexport.bench.bandwidth THREADS BYTES

Each thread looks for the largest of its part of an array that no cache holds, the plainest read there is. Prints bytes per second, the best
of several passes.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PASSES = 6


def read_bandwidth(threads: int, size: int, passes: int = PASSES) -> float:
    """Bytes per second that `threads` threads read together from an array of `size` bytes."""
    parts = np.array_split(np.ones(size // 4, np.int32), threads)
    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.max, parts))  # numpy's own loop, which leaves Python's lock to the others
            fastest = min(fastest, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / fastest


if __name__ == "__main__":
    print(read_bandwidth(int(sys.argv[1]), int(sys.argv[2])))
