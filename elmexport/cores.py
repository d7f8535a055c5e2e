"""Cores that this process may use, and threads that were asked for by the environment variable `ELMEXPORT_THREADS`.

The variable holds for onnxruntime and llama.cpp; torch, which runs checkpoints and Core ML packages, has `OMP_NUM_THREADS`.
"""

from __future__ import annotations

import os

from elmexport.errors import ElmExportError

VARIABLE = "ELMEXPORT_THREADS"


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def asked_threads() -> int | None:
    """Read the number of threads that was asked for; None if none was.

    Raises:
        ElmExportError: not a number of threads.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    if not value.isascii() or not value.isdecimal() or not int(value):
        raise ElmExportError(f"{VARIABLE} is {value!r}; it must be a number of threads, 1 or more, or unset")
    return int(value)
