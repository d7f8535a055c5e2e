"""Time and peak memory of tracing the four published sizes, each in a fresh process. No weight is made or read.

python benchmarks/trace_time.py [--json]
"""

from __future__ import annotations

import argparse
import json
import sys

from measure import report, run_python

SIZES = ("270M", "450M", "1.1B", "3B")
CODE = """
import json, resource, sys, time
from elmexport.models import trace
from elmexport.models import find_model
unit = 1 if sys.platform == "darwin" else 1024
config = find_model(sys.argv[1]).config
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
start = time.perf_counter()
graph = trace(config)
taken = time.perf_counter() - start
print(json.dumps({"parameters": config.parameter_count, "nodes": len(graph.nodes), "trace_s": round(taken, 2), "imports_mib": round(before / 2**20, 1)}))
"""
COLUMNS = {
    "model": "{model}",
    "parameters": "{parameters:,}",
    "nodes": "{nodes}",
    "trace s": "{trace_s:.1f}",
    "process s": "{process_s:.1f}",
    "imports MiB": "{imports_mib:.0f}",
    "peak MiB": "{peak_mib:.0f}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    rows = []
    for size in SIZES:
        done = run_python("-c", CODE, size)
        if done.exit_code:
            print(f"tracing {size} exited with {done.exit_code}:\n{done.stderr}", file=sys.stderr)
            return 1
        rows.append(
            {"model": size, **json.loads(done.stdout), "process_s": round(done.wall_s, 2), "peak_mib": round(done.peak_bytes / 2**20, 1)}
        )
    report("trace_time", rows, COLUMNS, as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
