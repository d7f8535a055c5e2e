"""Cores that this process may use, and threads that were asked for by the environment variable `ELMEXPORT_THREADS`.

It holds for onnxruntime and llama.cpp; torch, which runs checkpoints and Core ML packages, has `OMP_NUM_THREADS`.
"""

from __future__ import annotations

import os

from elmexport.errors import ElmExportError

VARIABLE = "ELMEXPORT_THREADS"


def asked_threads() -> int | None:
    """The number that was asked for, None if none was.

    Raises:
        ElmExportError: not a number of threads.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    if not value.isascii() or not value.isdecimal() or not int(value):
        raise ElmExportError(f"{VARIABLE} is {value!r}; it must be a number of threads, 1 or more, or unset")
    return int(value)
