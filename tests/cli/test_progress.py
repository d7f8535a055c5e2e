"""The progress bar is drawn on terminals only, and never on stdout."""

from __future__ import annotations

import sys

import pytest

from elmexport.cli.progress import progress_bar
from elmexport.progress import SilentProgress


def test_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        progress.stage("writing", 10)
        progress.advance(10)
    assert isinstance(progress, SilentProgress)
    assert capsys.readouterr() == ("", "")


def test_silent_where_stderr_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar() as progress:
        assert isinstance(progress, SilentProgress)


def test_stages_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as progress:
        progress.advance(1)  # before any stage: nothing to advance
        progress.stage("reading", 10)
        progress.advance(3)
        progress.stage("waiting")
        progress.stage("writing", 4)
        progress.advance(4)
    out, err = capsys.readouterr()
    assert out == ""
    last = err.split("writing")[-1]
    for name in ("reading", "waiting", "writing"):
        assert name in err
    assert "100%" in last
