"""Cache folder, for results that later commands use again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Name the cache folder: `$ELMEXPORT_CACHE`, else `elmexport` in the platform's folder for caches. It need not exist."""
    chosen = os.environ.get("ELMEXPORT_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("elmexport", appauthor=False, opinion=False)
