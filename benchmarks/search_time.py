"""What a search for bits takes: `--bits-per-weight` and `--max-drop` beside the plain export, each in a fresh process and with an empty cache.

python benchmarks/search_time.py                                   270M to ONNX, by mse
python benchmarks/search_time.py --models 270M 450M --target coreml --json

The checkpoint is random, in the model's shapes, stored in fp16 with `tiny`'s tokenizer: tries of `--max-drop` answer the bundled questions by chance, which takes
as long as knowing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf_time import SAVE
from measure import finished, report, run_python

SEARCHES = {"none": (), "--bits-per-weight 5.5": ("--bits-per-weight", "5.5"), "--max-drop 5": ("--max-drop", "5")}
COLUMNS = {"model": "{model}", "search": "{search}", "wall s": "{wall_s:.0f}", "cpu s": "{cpu_s:.0f}", "peak MiB": "{peak_mib:.0f}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["270M"], metavar="MODEL")
    parser.add_argument("--target", default="onnx", choices=("onnx", "coreml", "gguf", "mlx"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in given.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            finished(run_python("-c", SAVE, model, str(folder / "model")))
            for search, options in SEARCHES.items():
                print(f"{model} {given.target}, search: {search}", file=sys.stderr, flush=True)
                os.environ["ELMEXPORT_CACHE"] = str(folder / "cache")
                command = ("elmexport", given.target, "--model", str(folder / "model"), "--out", str(folder / "out"), "--force", *options)
                found = finished(run_python("-m", *command, *(() if options else ("--quant", "int4"))))
                rows.append(
                    {
                        "model": model,
                        "target": given.target,
                        "search": search,
                        "wall_s": round(found.wall_s, 1),
                        "cpu_s": round(found.cpu_s, 1),
                        "peak_mib": round(found.peak_bytes / 2**20),
                    }
                )
                shutil.rmtree(folder / "cache", ignore_errors=True)
    report("search_time", rows, COLUMNS, as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
