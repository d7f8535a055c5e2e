"""Core ML export beside the stock route (torch.jit.trace, ct.convert, linear_quantize_weights, save_multifunction), on random weights.

    python benchmarks/coreml_time.py [--model 270M] [--json]

Both write `prefill` (64 tokens) and `decode`, stateful, with symmetric 4-bit weights in blocks of 32, each in a fresh process. Ours measures
and checks as well by default; the stock route does not, so there is a row without. Ratios are to that row's. `benchmarks/coreml_stock.py` is
the stock route, and says what it works around.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import report, run_python

COLUMNS = {
    "route": "{route}",
    "wall s": "{wall_s:.1f}",
    "cpu s": "{cpu_s:.1f}",
    "peak MiB": "{peak_mib:.0f}",
    "package MiB": "{package_mib:.0f}",
    "times slower": "{wall_ratio:.1f}",
    "times the memory": "{memory_ratio:.1f}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="270M")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    ours = ["-m", "elmexport", "coreml", "--model", given.model, "--quant", "int4", "--random-weights", "0", "--tokenizer", "none", "--out"]
    stock = [str(Path(__file__).with_name("coreml_stock.py")), given.model, "--seed", "0", "--out"]
    routes = {
        "elmexport, export alone": [*ours, "{out}", "--no-verify", "--calibrate", "none"],
        "elmexport, as it comes": [*ours, "{out}"],
        "stock": [*stock, "{out}.mlpackage"],
    }
    rows: list[dict[str, Any]] = []
    for route, arguments in routes.items():
        print(route, file=sys.stderr, flush=True)
        folder = Path(tempfile.mkdtemp())
        try:
            done = run_python(*(argument.format(out=folder / "out") for argument in arguments))
            if done.exit_code:
                print(f"python {' '.join(arguments)}\nexited with {done.exit_code}:\n{done.stderr[-4000:]}", file=sys.stderr)
                return 1
            size = sum(path.stat().st_size for path in folder.rglob("weight.bin"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        first = rows[0] if rows else {"wall_s": done.wall_s, "peak_mib": done.peak_bytes / 2**20}
        rows.append(
            {
                "route": route,
                "wall_s": round(done.wall_s, 2),
                "cpu_s": round(done.cpu_s, 2),
                "peak_mib": round(done.peak_bytes / 2**20, 1),
                "package_mib": round(size / 2**20, 1),
                "wall_ratio": round(done.wall_s / first["wall_s"], 2),
                "memory_ratio": round(done.peak_bytes / 2**20 / first["peak_mib"], 2),
            }
        )
    report("coreml_time", rows, COLUMNS, as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
