"""Where the cache lies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elmexport.cache import cache_folder, cached_file, keep_document


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


def test_what_killed_processes_left_goes_with_the_next_file_of_the_folder(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, running, own, foreign = (tmp_path / f".a.npy.partial-{owner}" for owner in (gone.pid, os.getppid(), os.getpid(), "notes"))
    for path in (left, running, own, foreign):
        path.write_text("half")
    keep_document(tmp_path / "b.json", {"found": 1})
    assert sorted(tmp_path.iterdir()) == sorted([running, own, foreign, tmp_path / "b.json"])
    with pytest.raises(KeyboardInterrupt), cached_file(tmp_path / "c.npy") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not (tmp_path / "c.npy").exists() and not partial.exists()
