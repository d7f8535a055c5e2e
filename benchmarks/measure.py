"""What the benchmarks share: run a process and measure it, describe the machine, print a table or JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "coremltools", "gguf", "llama_cpp_python", "mlx", "mlx_lm")


@dataclass(frozen=True)
class Run:
    """One finished process."""

    exit_code: int
    wall_s: float
    cpu_s: float  # user and system, all threads
    peak_bytes: int  # largest resident memory
    stdout: str
    stderr: str


def run_python(*arguments: str) -> Run:
    """`run`, of this Python."""
    return run(sys.executable, *arguments)


def run(*command: str) -> Run:
    """Run `command` in a fresh process and wait for it.

    Memory is what the kernel counted for that one process. The count starts at the fork, with the memory of the process that measures:
    nothing heavy may be imported here.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # tells Popen that it has been waited for
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Run(process.returncode, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _RSS_UNIT, *texts)


def finished(run: Run) -> Run:
    """`run`, if it ended well; else the benchmark ends with what it said."""
    if run.exit_code:
        sys.exit(f"a command ended with {run.exit_code}:\n{run.stderr[-4000:]}")
    return run


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "packages": packages,
    }


def report(benchmark: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, as_json: bool) -> None:
    """Print `rows` to stdout: one JSON document, or a table of `columns` (heading to a format of the row, `"{wall_s:.1f}"`)."""
    if as_json:
        print(json.dumps({"benchmark": benchmark, "machine": machine(), "rows": list(rows)}, indent=2))
        return
    cells = [list(columns), *([form.format(**row) for form in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(cell.ljust(width) if i < 1 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        )
