"""Seconds and tokens of scoring OpenELM's seven zero-shot tasks, on random weights: what sharing prefixes and batching gain.

python benchmarks/eval_time.py                                          100 questions of each task, every engine, three ways of reading them
python benchmarks/eval_time.py --limit 5 --only "coreml int4" --json

Questions are random token ids as long as the tasks' (see LENGTHS); no data and no tokenizer is read.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import report, run_python

ENGINES = ("torch fp32", "onnx fp16", "onnx int8", "onnx int4", "coreml fp16", "coreml int4", "gguf int4")
WAYS = ("plain", "shared", "batched")
# Choices of a question; tokens of its context (BOS included) and of each choice: minimum, quartiles, maximum. From 200 to 300 validation rows
# of each task with Llama 2's tokenizer and lm-eval's prompts; sciq is an estimate. Winogrande's two contexts differ in their last tokens.
LENGTHS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "arc_challenge": (4, (12, 21, 31, 45, 132), (1, 3, 6, 9, 35)),
    "arc_easy": (4, (12, 19, 27, 39, 111), (1, 3, 4, 7, 20)),
    "boolq": (2, (49, 106, 148, 198, 498), (1, 1, 1, 1, 1)),
    "hellaswag": (4, (16, 32, 45, 71, 115), (3, 12, 21, 39, 84)),
    "piqa": (2, (7, 13, 16, 19, 33), (2, 10, 18, 33, 206)),
    "sciq": (4, (25, 90, 120, 155, 400), (1, 2, 3, 4, 12)),
    "winogrande": (2, (3, 17, 19, 22, 36), (1, 4, 5, 8, 22)),
}
# Runs in a process of its own: argv is the artifact ("" for torch, which has none), the model, the way, the lengths, the limit.
CODE = """
import json, os, sys, time
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
import numpy as np
from elmexport.evaluation.scoring import Request, score
from elmexport.runtimes.base import Runtime

path, model, way, lengths, limit = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), int(sys.argv[5])
if path:
    from elmexport.runtimes import open_artifact
    runtime = open_artifact(path)
else:
    from elmexport.checkpoint import open_checkpoint
    from elmexport.runtimes.torch import TorchRuntime
    runtime = TorchRuntime(open_checkpoint(model, random_weights=0))

def requests(task, seed):
    choices, context, choice = lengths[task]
    generator = np.random.default_rng(seed)
    draw = lambda quartiles: int(np.interp(generator.random(), np.linspace(0, 1, 5), quartiles))
    ids = lambda count: generator.integers(3, runtime.vocab_size, count).tolist()
    for _ in range(limit):
        shared, end = ids(draw(context)), ids(draw(choice))
        for _ in range(choices):
            if task == "winogrande":
                yield Request([*shared[:-2], *ids(2)], end)
            else:
                yield Request(shared, ids(draw(choice)))

tokens, depth = 0, 0
def counted(name, count):
    inner = getattr(runtime, name)
    def call(ids, *rest):
        global tokens, depth
        tokens += 0 if depth else count(ids)
        depth += 1
        try:
            return inner(ids, *rest)
        finally:
            depth -= 1
    setattr(runtime, name, call)

def plain(runtime, requests):
    for request in requests:
        ids = [*request.context, *request.continuation][:-1]
        runtime.logits(ids, last=len(request.continuation))

runtime.logits(list(range(3, 12)))  # loads and unpacks weights
runtime.continuations([[1, 2], [3, 4, 5]], 5)
if way == "shared":
    runtime._continuations = lambda continuations, position: Runtime._continuations(runtime, continuations, position)
else:
    counted("_continuations", lambda continuations: sum(map(len, continuations)))
counted("_forward", len)
for seed, task in enumerate(lengths):
    asked = list(requests(task, seed))
    tokens, start, cpu = 0, time.perf_counter(), time.process_time()
    if way == "plain":
        plain(runtime, asked)
    else:
        list(score(runtime, asked))
    figures = {"requests": len(asked), "tokens": tokens, "wall_s": round(time.perf_counter() - start, 2), "cpu_s": round(time.process_time() - cpu, 2)}
    print(json.dumps({"task": task, **figures}))
"""
COLUMNS = {
    "engine": "{engine}",
    "way": "{way}",
    "task": "{task}",
    "requests": "{requests}",
    "tokens": "{tokens:,}",
    "wall s": "{wall_s:.1f}",
    "cpu s": "{cpu_s:.1f}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="270M")
    parser.add_argument("--only", nargs="*", default=list(ENGINES), choices=ENGINES, metavar="ENGINE", help=f"of {', '.join(ENGINES)}")
    parser.add_argument(
        "--ways", nargs="*", default=list(WAYS), choices=WAYS, help="each request alone; prefixes read once; and continuations in batches"
    )
    parser.add_argument("--tasks", nargs="*", default=list(LENGTHS), choices=list(LENGTHS), metavar="TASK")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="questions of each task (100)")
    parser.add_argument(
        "--artifacts", type=Path, metavar="DIR", help="keep the artifacts here, and use those that are there (TARGET-QUANT)"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    lengths = json.dumps({task: LENGTHS[task] for task in given.tasks})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.artifacts or Path(temporary)
        for engine in given.only:
            path = "" if engine == "torch fp32" else _artifact(given.model, engine, folder)
            for way in given.ways:
                print(f"{engine}, {way}", file=sys.stderr, flush=True)
                done = run_python("-c", CODE, path, given.model, way, lengths, str(given.limit))
                if done.exit_code:
                    print(f"scoring with {engine} exited with {done.exit_code}:\n{done.stderr}", file=sys.stderr)
                    return 1
                found = [{"engine": engine, "way": way} | json.loads(line) for line in done.stdout.splitlines()]
                sums = {key: round(sum(row[key] for row in found), 2) for key in ("requests", "tokens", "wall_s", "cpu_s")}
                rows += [*found, {"engine": engine, "way": way, "task": "all"} | sums]
    report("eval_time", rows, COLUMNS, as_json=given.json)
    return 0


def _artifact(model: str, engine: str, folder: Path) -> str:
    target, quant = engine.split()
    path = folder / f"{target}-{quant}"
    if not path.exists():
        options = ("--model", model, "--random-weights", "0", "--no-verify", "--tokenizer", "none", "--quant", quant, "--out", str(path))
        done = run_python("-m", "elmexport", target, *options)
        if done.exit_code:
            sys.exit(f"the export of {engine} exited with {done.exit_code}:\n{done.stderr}")
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
