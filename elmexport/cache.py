"""Cache folder, for results that later commands use again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from elmexport.errors import ElmExportError
from elmexport.files import complete_file, remove_all_stale


def cache_folder() -> Path:
    """Name the cache folder: `$ELMEXPORT_CACHE`, else `elmexport` in the platform's folder for caches. It need not exist."""
    chosen = os.environ.get("ELMEXPORT_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("elmexport", appauthor=False, opinion=False)


def cached_path(kind: str, key: Sequence[Any], suffix: str) -> Path:
    """Name the file in the cache of what was computed from `key`, JSON values; `kind` is its folder."""
    return cache_folder() / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}{suffix}"


@contextmanager
def cached_file(path: Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` in the cache to write; see `complete_file`. What killed processes left beside it is removed.

    Raises:
        OSError: as writing does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_all_stale(path.parent)
    with complete_file(path) as partial:
        yield partial


def keep_document(path: Path, document: Any) -> None:
    """Write a JSON document into the cache.

    Raises:
        ElmExportError: `path` cannot be written.
    """
    try:
        with cached_file(path) as partial:
            partial.write_text(json.dumps(document), encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ElmExportError:
    """Describe why `path` in the cache cannot be written, and what to do."""
    return ElmExportError(
        f"cannot write {path}: {error.strerror or error}; free space, or choose another folder with the environment variable ELMEXPORT_CACHE"
    )
