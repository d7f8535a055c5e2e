"""Our ONNX artifacts in onnxruntime beside llama.cpp on our GGUF files of the same weights: prefill and decode, in turns, in one process.

python benchmarks/onnx_speed.py                                        270M, int4 beside Q4_0
python benchmarks/onnx_speed.py --models 450M 1.1B --quants int4 int8 --variant int4-block128
python benchmarks/onnx_speed.py --models 270M --torch --json

Weights are random. onnxruntime runs as our runtime sets it up; llama.cpp with its own defaults (fp16 cache, flash attention where it
chooses it), keys and values of one sequence, logits of the last token.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import machine, report

BATCH = 512  # tokens that llama.cpp reads at a time, its default
PAUSE_S = 0.05  # between engines, so that one's threads have stopped spinning before the other's start
READ_BYTES = 512 * 2**20
GGUF = {"int4": "Q4_0", "int8": "Q8_0"}  # what `elmexport gguf` writes
COLUMNS = {
    "model": "{model}",
    "test": "{test}",
    "engine": "{engine}",
    "tokens/s": "{tokens_per_s:.1f}",
    "lowest": "{lowest:.1f}",
    "highest": "{highest:.1f}",
    "ratio": "{ratio:.3f}",
    "bandwidth": "{bandwidth:.0%}",
}


class Engine(ABC):
    """A model with one sequence; `weight_bytes` is its file, `cache_bytes` what one cached token takes."""

    name: str
    weight_bytes: int
    cache_bytes: int

    @abstractmethod
    def feed(self, count: int, position: int) -> None:
        """Read `count` tokens behind the first `position` ones, as far as the logits of the last of them."""

    def fill(self, depth: int) -> None:
        for start in range(0, depth, BATCH):
            self.feed(min(BATCH, depth - start), start)

    @abstractmethod
    def close(self) -> None: ...


class Ours(Engine):
    """An artifact or a checkpoint in one of our runtimes."""

    def __init__(self, name: str, runtime: Any, weight_bytes: int, cache_bytes: int) -> None:
        self.name, self._runtime, self.weight_bytes, self.cache_bytes = name, runtime, weight_bytes, cache_bytes

    def feed(self, count: int, position: int) -> None:
        self._runtime.logits([7] * count, position, last=1)

    def close(self) -> None:
        self._runtime.close()


class LlamaCpp(Engine):
    def __init__(self, name: str, path: Path, context: int, threads: int, cache_bytes: int) -> None:
        import llama_cpp

        self.name, self._lib = name, llama_cpp
        self.weight_bytes, self.cache_bytes = path.stat().st_size, cache_bytes
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        self._handle = llama_cpp.llama_init_from_model(self._model, params)
        self._ids = (llama_cpp.llama_token * BATCH)(*([7] * BATCH))

    def feed(self, count: int, position: int) -> None:
        lib = self._lib
        if count > BATCH:
            raise ValueError(f"{count} tokens at a time; llama.cpp reads {BATCH}")
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._handle), 0, position, -1)
        if lib.llama_decode(self._handle, lib.llama_batch_get_one(self._ids, count)):
            raise RuntimeError(f"llama.cpp failed on {count} tokens at {position}")
        lib.llama_synchronize(self._handle)

    def close(self) -> None:
        self._lib.llama_free(self._handle)
        self._lib.llama_model_free(self._model)


@dataclass(frozen=True)
class Workload:
    name: str
    tokens: int
    depth: int
    one_by_one: bool

    def run(self, engine: Engine) -> float:
        """Tokens per second."""
        start = time.perf_counter()
        if self.one_by_one:
            for step in range(self.tokens):
                engine.feed(1, self.depth + step)
        else:
            engine.feed(self.tokens, self.depth)
        return self.tokens / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["270M"])
    parser.add_argument("--quants", nargs="*", default=["int4"], choices=list(GGUF), help="each beside llama.cpp's form of it")
    parser.add_argument("--variant", nargs="*", default=[], metavar="QUANT", help="more of our own --quant, beside the first of --quants")
    parser.add_argument("--torch", action="store_true", help="fp32 eager torch as well")
    parser.add_argument("--prefill", nargs="*", type=int, default=[128, 512], metavar="TOKENS", help="512 at most")
    parser.add_argument("--decode", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--depths", nargs="*", type=int, default=[0, 1024], metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="keep the exports there, and use those that are there")
    parser.add_argument("--json", action="store_true", help="JSON lines")
    given = parser.parse_args()
    os.environ["ELMEXPORT_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(given.threads)

    from elmexport.bench.bandwidth import read_bandwidth

    tests = [Workload(f"prefill {tokens}", tokens, 0, one_by_one=False) for tokens in given.prefill]
    tests += [Workload(f"decode at {depth}", given.decode, depth, one_by_one=True) for depth in given.depths]
    context = max(test.depth + test.tokens for test in tests)
    rows: list[dict[str, Any]] = []
    read = 0.0
    for model in given.models:
        for quant in given.quants:
            variants = given.variant if quant == given.quants[0] else []
            with_torch = given.torch and quant == given.quants[0]
            with _folder(given.artifacts) as folder:
                engines = _engines(folder, model, quant, variants, with_torch=with_torch, context=context, threads=given.threads)
                for test in tests:
                    read = max(read, read_bandwidth(given.threads, READ_BYTES))
                    rows += _compare(model, quant, test, engines, given.repeats)
                for engine in engines:
                    engine.close()
                gc.collect()
    for row in rows:
        row["bandwidth"] = row["tokens_per_s"] * row["bytes_per_token"] / read
    if given.json:
        print(json.dumps({"benchmark": "onnx_speed", "machine": machine(), "threads": given.threads, "read_bytes_per_s": round(read)}))
        for row in rows:
            print(json.dumps(row))
    else:
        print(f"{given.threads} threads read {read / 1e9:.1f} GB/s")
        report("onnx_speed", rows, COLUMNS, as_json=False)
    return 0


def _compare(model: str, quant: str, test: Workload, engines: list[Engine], repeats: int) -> Iterator[dict[str, Any]]:
    """All engines in turn, `repeats` times after a first round that does not count. llama.cpp comes first: ratios are to its round."""
    speeds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for engine in engines:
        engine.fill(test.depth)
    for round_ in range(repeats + 1):
        for engine in engines:
            time.sleep(PAUSE_S)
            speed = test.run(engine)
            if round_:
                speeds[engine.name].append(speed)
        print(f"{model} {quant} {test.name}: round {round_} of {repeats}", file=sys.stderr, flush=True)
    reference = speeds[engines[0].name]
    for engine in engines:
        found = speeds[engine.name]
        bytes_per_token = engine.weight_bytes + engine.cache_bytes * (test.depth + test.tokens // 2) if test.one_by_one else 0
        yield {
            "model": model,
            "test": test.name,
            "engine": engine.name,
            "tokens_per_s": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "ratio": statistics.median(mine / theirs for mine, theirs in zip(found, reference, strict=True)),
            "bytes_per_token": bytes_per_token,
        }


def _engines(folder: Path, model: str, quant: str, variants: list[str], *, with_torch: bool, context: int, threads: int) -> list[Engine]:
    from elmexport.checkpoint import open_checkpoint
    from elmexport.runtimes.onnxruntime import open_runtime
    from elmexport.runtimes.torch import TorchRuntime

    checkpoint = open_checkpoint(model, random_weights=0)
    values = sum(2 * layer.kv_heads * checkpoint.config.head_dim for layer in checkpoint.config.layers)  # of one token's keys and values
    (gguf,) = _export(folder, "gguf", model, quant, context).glob("*.gguf")
    engines: list[Engine] = [LlamaCpp(f"llama.cpp {GGUF[quant]}", gguf, context, threads, 2 * values)]
    for name in (quant, *variants):
        artifact = _export(folder, "onnx", model, name, context)
        (data,) = artifact.glob("onnx/*_data")
        engines.append(Ours(f"onnxruntime {name}", open_runtime(artifact), data.stat().st_size, 4 * values))
    if with_torch:
        size = sum(4 * spec.size for spec in checkpoint.specs.values())
        engines.append(Ours("torch fp32", TorchRuntime(checkpoint, context=context), size, 4 * values))
    return engines


def _export(folder: Path, target: str, model: str, quant: str, context: int) -> Path:
    out = folder / f"{model}-{target}-{quant}-{context}"
    if not out.exists():
        print(f"{target} {model} {quant}", file=sys.stderr, flush=True)
        options = ("--random-weights", "0", "--context", str(context), "--calibrate", "none", "--no-verify", "--out", str(out))
        command = (sys.executable, "-m", "elmexport", target, "--model", model, "--quant", quant, *options)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


if __name__ == "__main__":
    raise SystemExit(main())
