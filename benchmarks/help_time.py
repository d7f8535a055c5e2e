"""How long `elmexport --help` takes, beside a Python that does nothing: medians of ten, the two alternating.

python benchmarks/help_time.py [--runs N] [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping

from measure import report, run_python

COMMANDS: Mapping[str, tuple[str, ...]] = {"python -c pass": ("-c", "pass"), "elmexport --help": ("-m", "elmexport", "--help")}
COLUMNS = {
    "command": "{command}",
    "median s": "{median_s:.3f}",
    "fastest s": "{fastest_s:.3f}",
    "slowest s": "{slowest_s:.3f}",
    "ratio": "{ratio:.1f}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for i in range(given.runs + 1):
        for name, arguments in COMMANDS.items():
            done = run_python(*arguments)
            if done.exit_code:
                print(f"{name} exited with {done.exit_code}:\n{done.stderr}", file=sys.stderr)
                return 1
            if i:  # the first round fills the disk cache and compiles bytecode
                times[name].append(done.wall_s)
    base = statistics.median(times["python -c pass"])
    rows = [
        {
            "command": name,
            "median_s": round(statistics.median(taken), 4),
            "fastest_s": round(min(taken), 4),
            "slowest_s": round(max(taken), 4),
            "ratio": round(statistics.median(taken) / base, 2),
        }
        for name, taken in times.items()
    ]
    report("help_time", rows, COLUMNS, as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
