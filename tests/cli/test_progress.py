"""The progress bar is drawn on terminals only, and never on stdout."""

from __future__ import annotations

import re
import sys

import pytest

from elmexport.cli.progress import note, progress_bar
from elmexport.errors import ElmExportError
from elmexport.progress import Progress, SilentProgress


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stderr, which is captured, be one."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")


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
    make_terminal(monkeypatch)
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


def test_quiet_draws_nothing_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_terminal(monkeypatch)
    with progress_bar(quiet=True) as progress:
        progress.stage("writing", 10)
        progress.advance(10)
    note("nobody reads this", quiet=True)
    assert capsys.readouterr() == ("", "")


def stages(progress: Progress) -> None:
    progress.stage("reading [all]", 10)  # no markup
    progress.advance(10)
    progress.stage("writing")


EXPECTED = ["start", "reading [all]", "writing", "in all"]


def test_verbose_says_how_long_each_stage_took(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(verbose=True) as progress:
        stages(progress)
    out, err = capsys.readouterr()
    assert out == ""
    lines = [re.fullmatch(r" +(\d+\.\d) s  (.*)", line) for line in err.splitlines()]
    assert [line and line[2] for line in lines] == EXPECTED


def test_verbose_on_a_terminal_writes_above_the_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_terminal(monkeypatch)
    with progress_bar(verbose=True) as progress:
        stages(progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.findall(r" \d+\.\d s  (start|reading \[all\]|writing|in all)", err) == EXPECTED
    assert "100%" in err


def test_verbose_tells_where_an_error_came(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress_bar(verbose=True) as progress:
        stages(progress)
        raise KeyError
    assert [line.rpartition("s  ")[2] for line in capsys.readouterr().err.splitlines()] == EXPECTED


def test_a_library_may_draw_on_a_terminal_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bar(verbose=True) as progress:
        assert not progress.lend("uploading")
    assert "s  uploading" in capsys.readouterr().err
    make_terminal(monkeypatch)
    with progress_bar() as progress:
        stages(progress)
        assert progress.lend("uploading [all]")
        sys.stderr.write("<bar of the library>")  # rich does not hold it back any more
        assert capsys.readouterr().err.endswith("uploading [all]\n<bar of the library>")


def test_both_are_refused() -> None:
    with pytest.raises(ElmExportError, match="--quiet and --verbose exclude each other"), progress_bar(quiet=True, verbose=True):
        pass
