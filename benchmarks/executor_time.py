"""Prefill through the MIL executor against torch eager in float32, same weights, same process.

    python benchmarks/executor_time.py [--model 270M] [--seed 0] [--quant fp16] [--tokens 64 128] [--device neural-engine gpu]

Exports random weights of the model's shapes, then times `logits` of a text from an empty cache, all rows: the model in torch (float32), and
the package in the executor, rounding after each operation (fp16) and not (fp32). Seconds are the median of the rounds, engines taking
turns, after a first call that reads the weights. One thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from elmexport.checkpoint import open_checkpoint
from elmexport.exporting import export_checkpoint
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.coreml import open_runtime
from elmexport.runtimes.torch import TorchRuntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="270M")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quant", default="fp16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--device", nargs="+", default=["neural-engine", "gpu"])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.model, random_weights=given.seed)
    reference = TorchRuntime(checkpoint, context=given.context)
    with tempfile.TemporaryDirectory() as folder:
        for device in given.device:
            out = Path(folder, device)
            export_checkpoint(checkpoint, "coreml", given.quant, out=out, context=given.context, verify=False, settings={"device": device})
            for precision in ("fp16", "fp32"):
                executor = open_runtime(out, precision=precision)  # type: ignore[arg-type]
                for tokens in given.tokens:
                    report(f"{device:<14} {precision}", reference, executor, tokens, given.rounds)
                del executor
                gc.collect()


def report(label: str, reference: Runtime, executor: Runtime, tokens: int, rounds: int) -> None:
    ids = np.random.default_rng(0).integers(0, reference.vocab_size, tokens)
    times: dict[str, list[float]] = {"torch": [], "executor": []}
    for turn in range(rounds + 1):
        for name, runtime in (("torch", reference), ("executor", executor)):
            seconds = timed(lambda runtime=runtime: runtime.logits(ids))  # type: ignore[misc]
            if turn:  # the first call reads the weights
                times[name].append(seconds)
    torch_time, executor_time = (statistics.median(times[name]) for name in ("torch", "executor"))
    print(
        f"{label}  {tokens:4} tokens  torch fp32 {torch_time:6.3f} s  executor {executor_time:6.3f} s  {executor_time / torch_time:5.2f} x",
        flush=True,
    )


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
