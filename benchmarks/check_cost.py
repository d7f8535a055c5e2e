"""What the checks of an export cost: the export alone beside the export as it comes, on one stored checkpoint, each in a fresh process.

python benchmarks/check_cost.py                                  270M and 450M to every format, at int4
python benchmarks/check_cost.py --models 270M --targets mlx --json

The checkpoint is random, in the model's shapes, stored in fp16 with `tiny`'s tokenizer. "Alone" is `--no-verify --calibrate none`: no pass of the
model, no self-check, no step up. Ratios are of what the checks add in CPU seconds to the whole of the export alone, start and imports
included, and of the peaks of memory.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf_time import SAVE
from measure import finished, report, run_python

TARGETS = ("onnx", "gguf", "mlx", "coreml", "coreml-gpu")
COLUMNS = {
    "model": "{model}",
    "target": "{target}",
    "alone cpu s": "{alone_cpu_s:.1f}",
    "alone MiB": "{alone_mib:.0f}",
    "as it comes cpu s": "{whole_cpu_s:.1f}",
    "as it comes MiB": "{whole_mib:.0f}",
    "checks / export": "{cpu_ratio:.2f}",
    "memory ratio": "{memory_ratio:.2f}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["270M", "450M"], metavar="MODEL")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=TARGETS, metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the checkpoints and artifacts go for a while")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        for model in given.models:
            checkpoint = folder / f"OpenELM-{model}"
            finished(run_python("-c", SAVE, model, str(checkpoint)))
            for target in given.targets:
                print(f"{model} {target}", file=sys.stderr, flush=True)
                rows.append(_row(model, target, checkpoint, given.quant, folder / "out"))
            shutil.rmtree(checkpoint)
    report("check_cost", rows, COLUMNS, as_json=given.json)
    return 0


def _row(model: str, target: str, checkpoint: Path, quant: str, out: Path) -> dict[str, Any]:
    name, _, device = target.partition("-")
    command = ["-m", "elmexport", name, "--model", str(checkpoint), "--quant", quant, "--out", str(out), "--force"]
    command += ["--device", device] if device else []
    alone, whole = (finished(run_python(*command, *more)) for more in (("--no-verify", "--calibrate", "none"), ()))
    shutil.rmtree(out)
    return {
        "model": model,
        "target": target,
        "alone_wall_s": round(alone.wall_s, 2),
        "alone_cpu_s": round(alone.cpu_s, 2),
        "alone_mib": round(alone.peak_bytes / 2**20, 1),
        "whole_wall_s": round(whole.wall_s, 2),
        "whole_cpu_s": round(whole.cpu_s, 2),
        "whole_mib": round(whole.peak_bytes / 2**20, 1),
        "cpu_ratio": round(whole.cpu_s / alone.cpu_s - 1, 3),
        "memory_ratio": round(whole.peak_bytes / alone.peak_bytes, 3),
    }


if __name__ == "__main__":
    sys.exit(main())
