"""Wall time and peak memory of exports, each in a fresh process, on random weights.

python benchmarks/export_time.py                          270M and 450M to every format and quantization, 3B to one; with and without check
python benchmarks/export_time.py --models 270M --targets gguf --json
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import report, run_python

QUANTS = {"onnx": ("fp32", "fp16", "int8", "int4"), "coreml": ("fp16", "int8", "int4"), "gguf": ("fp32", "fp16", "bf16", "int8", "int4")}
LARGE = ("3B", "coreml", "int4")  # of the formats, Core ML asks most of the exporter
COLUMNS = {
    "model": "{model}",
    "target": "{target}",
    "quant": "{quant}",
    "check": "{check}",
    "wall s": "{wall_s:.1f}",
    "cpu s": "{cpu_s:.1f}",
    "peak MiB": "{peak_mib:.0f}",
    "artifact MiB": "{artifact_mib:.0f}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["270M", "450M"], metavar="MODEL", help="sizes to export to everything")
    parser.add_argument("--targets", nargs="*", default=list(QUANTS), choices=list(QUANTS), metavar="TARGET")
    parser.add_argument("--quants", nargs="*", metavar="QUANT", help="only these, of those a target has")
    parser.add_argument(
        "--large", nargs=3, default=LARGE, metavar=("MODEL", "TARGET", "QUANT"), help=f"one export of a large model ({' '.join(LARGE)})"
    )
    parser.add_argument("--no-large", action="store_true", help="leave it out")
    parser.add_argument(
        "--check", choices=("without", "with", "both"), default="both", help="exports without the final check, with it, or one of each"
    )
    parser.add_argument("--tokenizer", help="passed on to elmexport (random weights come without a tokenizer)")
    parser.add_argument("--context", type=int, help="passed on to elmexport")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write artifacts here and keep them")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    plan = list(_plan(given))
    rows = []
    for i, (model, target, quant, check) in enumerate(plan, start=1):
        print(f"[{i}/{len(plan)}] {model} {target} {quant}{' and its check' if check else ''}", file=sys.stderr, flush=True)
        row = _export(model, target, quant, check, given)
        if row is None:
            return 1
        rows.append(row)
    report("export_time", rows, COLUMNS, as_json=given.json)
    return 0


def _plan(given: argparse.Namespace) -> Iterator[tuple[str, str, str, bool]]:
    checks = {"without": (False,), "with": (True,), "both": (False, True)}[given.check]
    jobs = [(m, t, q) for m in given.models for t in given.targets for q in QUANTS[t] if not given.quants or q in given.quants]
    if not given.no_large:
        jobs.append(tuple(given.large))
    for job in jobs:
        for check in checks:
            yield *job, check


def _export(model: str, target: str, quant: str, check: bool, given: argparse.Namespace) -> dict[str, Any] | None:
    folder = Path(tempfile.mkdtemp(dir=given.keep))
    out = folder / f"{model}-{target}-{quant}"
    arguments = ["-m", "elmexport", target, "--model", model, "--quant", quant, "--random-weights", "0", "--out", str(out)]
    arguments += [] if check else ["--no-verify"]
    arguments += [] if given.tokenizer is None else ["--tokenizer", given.tokenizer]
    arguments += [] if given.context is None else ["--context", str(given.context)]
    try:
        done = run_python(*arguments)
        if done.exit_code:
            print(f"python {' '.join(arguments)}\nexited with {done.exit_code}:\n{done.stderr}", file=sys.stderr)
            return None
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "model": model,
        "target": target,
        "quant": quant,
        "check": "yes" if check else "no",
        "wall_s": round(done.wall_s, 2),
        "cpu_s": round(done.cpu_s, 2),
        "peak_mib": round(done.peak_bytes / 2**20, 1),
        "artifact_mib": round(size / 2**20, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
