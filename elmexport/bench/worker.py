"""Benchmark of one artifact, once, in this process: python -m elmexport.bench.worker, its job as JSON on stdin.

The last line of stdout is JSON: the figures, or `error` and `exit_code` of an `ElmExportError`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from elmexport.bench.guesses import Guesses, measure_guesses
from elmexport.bench.measure import measure
from elmexport.bench.memory import peak_bytes, resident_bytes
from elmexport.bench.workload import Workload
from elmexport.errors import ElmExportError
from elmexport.runtimes import artifact_kind, open_directly, preload
from elmexport.runtimes.artifact_tokenizer import find_tokenizer


def run(path: Path, workload: Workload, fit: Collection[str], guesses: Guesses | None = None) -> dict[str, Any]:
    """Open `path` and measure `workload` on it, the parts in `fit` cut to what fits the context.

    With `guesses`, speculative decoding is measured, too.

    Raises:
        ElmExportError: nothing that a runtime opens, or a workload beyond the context.
        MissingDependencyError: the engine is not installed.
    """
    kind = artifact_kind(path)
    preload(kind)
    before = resident_bytes()
    start = time.perf_counter()
    runtime = open_directly(kind, path)  # what measures it has probed it
    load = time.perf_counter() - start
    workload = workload.fitted(runtime.context, fit)
    workload.check_context(path.name, runtime.context)
    timed = measure(runtime, workload)
    peak = peak_bytes()  # a draft model's memory is not the artifact's
    speculation = None
    if guesses is not None:
        speculation = measure_guesses(runtime, path, find_tokenizer(kind, path), guesses, workload.generate)
    return {
        "kind": kind,
        "engine": runtime.name,
        "context": runtime.context,
        "generate": workload.generate,
        "load_s": load,
        "prefill_s": timed.prefill_s,
        "decode_s": timed.decode_s,
        "before_bytes": before,
        "peak_bytes": peak,
        "speculation": speculation,
    }


def main() -> None:
    """Read the job from stdin, print the figures or the error as JSON."""
    job = json.load(sys.stdin)
    workload = Workload(tuple(job["prompts"]), tuple(job["depths"]), job["generate"])
    try:
        guesses = Guesses(**job["guesses"]) if job.get("guesses") else None
        answer = run(Path(job["path"]), workload, job["fit"], guesses)
    except ElmExportError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
