"""Resident memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """Resident memory now in bytes, pages of mapped files that were touched included; None where the system does not say."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Peak resident memory, in bytes.

    Linux's counter for waiting parents (`ru_maxrss`) begins with the memory of the process that started this one, so it is not used there.
    """
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None
