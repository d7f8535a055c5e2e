"""Long runs: thousands of generations and some evaluations in one process, every artifact opened and closed each time.

    python -m tests.endurance.long_run --count 2000 [--evals 20]

Prints the resident memory, the open files and the threads after a tenth of the runs and after each further tenth, as JSON lines. Exit code 1 where memory has
grown by more than 5 % and 16 MiB between the second tenth and the last, or files or threads are left open.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.endurance.corpus import run
from tests.endurance.kill import WORK, prepared

ALLOWED = 16 << 20  # bytes


def quiet(command: Sequence[str]) -> None:
    """Run `command`, which must succeed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")), contextlib.redirect_stderr(said):
        code = run(*command)
    assert code == 0, said.getvalue()


def state() -> dict[str, int]:
    """Resident bytes, open files and threads of this process."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return {"resident": resident, "files": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}


def repeat(name: str, commands: Sequence[Sequence[str]], count: int) -> bool:
    """Run `commands` in turn, `count` in all; whether nothing grew."""
    states = []
    for number in range(count):
        quiet(commands[number % len(commands)])
        if (number + 1) % max(count // 10, 1) == 0:
            states.append(state())
            print(json.dumps({"of": name, "runs": number + 1, **states[-1]}), flush=True)
    first, last = states[min(1, len(states) - 1)], states[-1]
    grown = last["resident"] - first["resident"]
    return grown <= max(ALLOWED, 0.05 * first["resident"]) and last["files"] <= first["files"] and last["threads"] <= first["threads"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="generations")
    parser.add_argument("--evals", type=int, default=20)
    parser.add_argument("--corpus", type=Path, help="folder of the corpus of the fuzzing; made without")
    given = parser.parse_args()
    with prepared(given.corpus) as corpus, tempfile.TemporaryDirectory(prefix="long-") as folder:
        generations = [
            ("generate", str(corpus / name), "hello there", "--max-tokens", "8") for name in ("onnx", "gguf", "coreml", "mlx", "model")
        ]
        flat = []
        if given.count:
            flat.append(repeat("generations", generations, given.count))
        for number in range(2 if given.evals else 0):  # without a cache of answers and with it
            os.environ["ELMEXPORT_CACHE"] = f"{folder}/cache{number}"
            flat.append(repeat("evals", WORK["eval"].commands(corpus, Path(folder) / "report.json"), max(given.evals // 2, 1)))
    sys.exit(0 if all(flat) else 1)


if __name__ == "__main__":
    main()
