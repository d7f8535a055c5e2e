"""Timing of a workload on an open runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmexport.bench.workload import Workload
from elmexport.runtimes.base import Runtime

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Timings:
    """Seconds for each prompt length, and for the tokens generated at each depth."""

    prefill_s: dict[int, float]
    decode_s: dict[int, float]


def measure(runtime: Runtime, workload: Workload, clock: Clock = time.perf_counter) -> Timings:
    """Time `workload`, which fits the runtime's context, after a first run of it that is not timed.

    Ids are random and the same every time. What is timed is `Runtime.greedy`, a step of generation: logits of the last token, and the choice.
    """
    ids = np.random.default_rng(0).integers(0, runtime.vocab_size, runtime.context)
    _warm_up(runtime, workload, ids)
    prefill = {}
    for prompt in workload.prompts:
        start = clock()
        runtime.greedy(ids[:prompt])
        prefill[prompt] = clock() - start
    decode = {}
    for depth in workload.depths:
        if depth:
            runtime.greedy(ids[:depth])
        start = clock()
        for position in range(depth, depth + workload.generate):
            runtime.greedy(ids[position : position + 1], position)
        decode[depth] = clock() - start
    return Timings(prefill, decode)


def _warm_up(runtime: Runtime, workload: Workload, ids: NDArray[np.int64]) -> None:
    """Engines allocate, and some unpack weights, at the first call of each shape."""
    for prompt in workload.prompts:
        runtime.greedy(ids[:prompt])
    if workload.depths:
        runtime.greedy(ids[:1])
