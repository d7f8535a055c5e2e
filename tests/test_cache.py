"""Where the cache lies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from elmexport.cache import cache_folder


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("ELMEXPORT_CACHE")
    assert cache_folder().name == "elmexport"


@pytest.mark.skipif(sys.platform != "linux", reason="the XDG folders are Linux's")
def test_else_it_is_in_the_platforms_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ELMEXPORT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "elmexport"
