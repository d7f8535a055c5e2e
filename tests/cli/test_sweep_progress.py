"""What a sweep says while it runs: lines, and the live table of a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live

from elmexport.cli.sweep_progress import _Lines, _Table, print_failures
from elmexport.sweep.cell import Planned
from elmexport.sweep.jobs import Job, Kind, Outcome, State

JOBS = [Job(str(number), f"model onnx int{number} mse", Kind.CELL, "out", (), {}) for number in range(4)]
DONE = Outcome("0", State.DONE, seconds={"export": 60.0, "eval": 40.0}, peak_bytes=1_250_000_000)
FAILED = Outcome("1", State.FAILED, "export: no such quant", 2, attempts=1)


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _Lines(JOBS)
    lines.tick(["0", "1"], 2)
    lines.ended(JOBS[0], DONE)
    lines.retried(JOBS[2], Outcome("2", State.CRASHED, "export: killed by signal 9"))
    lines.lost()
    lines.ended(JOBS[1], FAILED)
    assert capsys.readouterr().err.splitlines() == [
        "1/4  model onnx int0 mse: done in 1:40, 1.2 GB, 2:30 left",  # three more of 100 seconds, two at a time
        "model onnx int2 mse: export: killed by signal 9; trying again",
        "the dask scheduler cannot be reached; waiting for it to come back",
        "2/4  model onnx int1 mse: failed: export: no such quant, 1:40 left",
    ]


def test_the_live_table() -> None:
    out = io.StringIO()
    with Live(console=Console(file=out, force_terminal=True, width=100, color_system=None), auto_refresh=False) as live:
        shown = _Table(JOBS, live)
        shown.tick(["0", "1"], 2)
        shown.ended(JOBS[0], DONE)
        shown.ended(JOBS[1], FAILED)
        shown.tick(["2", "3"], 2)
        live.refresh()
    said = out.getvalue()
    assert "1/4  model onnx int0 mse: done in 1:40" in said
    assert "2 of 4 jobs, 1 failed, 0:00 so far, 1:40 left" in said
    table = said[said.rindex("2 of 4 jobs") :]
    assert "model onnx int2 mse" in table and "model onnx int3 mse" in table and "model onnx int0 mse" not in table


def test_failures_are_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    planned = [Planned(job) for job in JOBS]
    assert not print_failures(planned, {"0": DONE}, tmp_path)
    assert capsys.readouterr().out.startswith("4 jobs of 4 done")
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "1.txt").write_text("")
    assert print_failures(planned, {"0": DONE, "1": FAILED}, tmp_path)
    said = capsys.readouterr()
    assert said.out.startswith("3 jobs of 4 done") and "1 job failed:" in said.err
    assert "model onnx int1 mse  1         export: no such quant" in said.err and "The same command tries them again." in said.err
