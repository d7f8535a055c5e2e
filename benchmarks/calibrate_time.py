"""Wall time and peak memory of calibration, each run in a fresh process, on random weights: what each kind of statistics adds.

python benchmarks/calibrate_time.py                        270M, 450M and 1.1B, 32768 tokens
python benchmarks/calibrate_time.py --models 270M --tokens 4096 --json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import report, run_python

KINDS = {"forward": "the layers alone, nothing measured", "diagonal": "elmexport calibrate", "hessian": "elmexport calibrate --hessian"}
COLUMNS = {
    "model": "{model}",
    "measured": "{kind}",
    "tokens": "{tokens}",
    "wall s": "{wall_s:.1f}",
    "cpu s": "{cpu_s:.1f}",
    "peak MiB": "{peak_mib:.0f}",
    "file MiB": "{file_mib:.1f}",
}
# The same loop as `calibration.collect`, without its observer.
FORWARD = """
import sys, torch
from calibration.calibrate import make_sample
from elmexport.checkpoint import open_checkpoint
from elmexport.graph.device import torch_device
from elmexport.graph.forward import layer_stages, stage_by_stage
from elmexport.models import trace

with torch.no_grad():
    checkpoint = open_checkpoint(sys.argv[1], random_weights=0, tokenizer="none")
    sample = make_sample(checkpoint, tokens=int(sys.argv[2]))
    stages = layer_stages(trace(checkpoint.config, sample.window))[:-1]
    for _ in stage_by_stage(stages, lambda spec: checkpoint.tensor(spec.name), torch.from_numpy(sample.ids), torch_device()):
        pass
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["270M", "450M", "1.1B"], metavar="MODEL")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for model in given.models:
        for kind in given.kinds:
            print(f"{model}: {KINDS[kind]}", file=sys.stderr, flush=True)
            row = _run(model, kind, given.tokens)
            if row is None:
                return 1
            rows.append(row)
    report("calibrate_time", rows, COLUMNS, as_json=given.json)
    return 0


def _run(model: str, kind: str, tokens: int) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "statistics.safetensors"
        arguments = ["-c", FORWARD, model, str(tokens)]
        if kind != "forward":
            arguments = ["-m", "elmexport", "calibrate", "--model", model, "--random-weights", "0", "--tokenizer", "none"]
            arguments += ["--tokens", str(tokens), "--out", str(out), *(["--hessian"] if kind == "hessian" else [])]
        done = run_python(*arguments)
        if done.exit_code:
            print(f"python {' '.join(arguments)}\nexited with {done.exit_code}:\n{done.stderr}", file=sys.stderr)
            return None
        size = out.stat().st_size if out.is_file() else 0
    return {
        "model": model,
        "kind": kind,
        "tokens": tokens,
        "wall_s": round(done.wall_s, 2),
        "cpu_s": round(done.cpu_s, 2),
        "peak_mib": round(done.peak_bytes / 2**20, 1),
        "file_mib": round(size / 2**20, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
