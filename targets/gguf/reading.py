"""GGUF files as gguf's own reader finds them, within the file's bounds.

Alone, it would count through an array that says it has 2^62 numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader


def open_reader(path: Path) -> GGUFReader:
    """Read the metadata and the places of the tensors of the file `path`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no GGUF file, or is damaged.
    """
    from gguf import GGUFReader

    class Bounded(GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **options: Any) -> Any:
            found = super()._get(offset, dtype, count, *more, **options)
            if len(found) < count:
                raise ValueError("it ends in the middle of what it says it holds")
            return found

    try:
        return Bounded(path)
    except (LookupError, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
