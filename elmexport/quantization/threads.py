"""Chunks of tensor work in a pool of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(work: Callable[[int], None], starts: Sequence[int]) -> None:
    """Call `work` on every start, on as many threads as torch would use, each running its ops alone.

    Threads inside ops would meet after every one of some eighty short ops a chunk; whole chunks to a thread are twice as fast.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        for start in starts:
            work(start)
        return
    inference = torch.is_inference_mode_enabled()

    def run(start: int) -> None:
        with torch.inference_mode(inference):  # a mode of the calling thread, which the workers must share to write its tensors
            work(start)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, starts))
    finally:
        torch.set_num_threads(threads)
