"""Where tests keep what is slow to install or build, from one run to the next."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from elmexport.cache import cache_folder

FOLDER = cache_folder() / "tests"  # asked for once: single tests point the product's cache elsewhere


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `make(folder)` unless it is there; it appears complete or not at all."""
    place = FOLDER / name
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            make(made)
            if not place.is_dir():  # another process may have been faster
                made.rename(place)
    return place
