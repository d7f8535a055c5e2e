"""llama.cpp's importance matrix in its former binary form: recognized by calibration and by the GGUF target, read by neither."""

from __future__ import annotations

import struct
from pathlib import Path


def is_legacy_imatrix(path: Path) -> bool:
    """Whether `path` begins as llama.cpp's `.dat` files do: the number of entries, then the first one's name and its length, int32."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            entries, length = struct.unpack("<ii", head) if len(head) == 8 else (0, 0)
            if not (0 < entries < 1 << 20 and 0 < length < 256):
                return False
            name = file.read(length)
    except OSError:
        return False
    return len(name) == length and name.isascii() and name.decode("ascii").isprintable() and name.endswith(b".weight")
