"""`elmexport sweep` from end to end, through the program: what it leaves is what single commands give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elmexport.artifact import file_sha256
from elmexport.sweep.folder import read_jobs, read_result
from elmexport.sweep.jobs import Kind
from tests.cli.conftest import Run
from tests.sweep.conftest import LEAST

PLAN = 'models = ["tiny"]\nformats = ["onnx", "gguf"]\nquants = ["int4"]\nmethods = ["gptq"]\ntokens = 512\ntasks = []\ntext_tokens = 128\n'


def contents(cell: Path) -> dict[str, Any]:
    """Hashes of the artifact's files, and the figures of the report: all but how long it took."""
    found: dict[str, Any] = {
        path.relative_to(cell).as_posix(): file_sha256(path) for path in cell.rglob("*") if path.is_file() and path.parent != cell
    }
    report = json.loads((cell / "eval-1.json").read_text(encoding="utf-8"))
    return found | {"report": {key: value for key, value in report.items() if key != "seconds"}}


@pytest.mark.slow
def test_cells_are_single_commands(tmp_path: Path) -> None:
    """The same bytes and figures, from codes that were computed once; a second run does nothing."""
    plan, out, single = tmp_path / "plan.toml", tmp_path / "out", tmp_path / "single"
    plan.write_text(PLAN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ELMEXPORT_THREADS": "1"}
    command = [sys.executable, "-m", "elmexport", "sweep", str(plan), "--out", str(out), "--workers", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 jobs of 3 done" in done.stdout
    assert len(list((out / "shared" / "weights").iterdir())) == 1 and not (out / "shared" / "answers").exists()
    assert len(list((out / "shared" / "distributions").iterdir())) == 1
    cells = [job for job in read_jobs(out) if job.kind is Kind.CELL]
    assert [job.label for job in cells] == ["OpenELM-tiny onnx int4 gptq", "OpenELM-tiny gguf int4 gptq"]
    cell = out / "cells" / cells[0].key
    facts = read_result(cell).facts
    assert facts is not None
    single.mkdir()
    for arguments in (
        ("onnx", "--model", "tiny", "--quant", "int4", "--out", facts.artifact, "--method", "gptq", "--tokens", "512"),
        ("eval", facts.artifact, "--tasks", "none", "--text-tokens", "128", "--report", "eval-1.json"),
    ):
        own = environment | {"ELMEXPORT_CACHE": str(tmp_path / "cache")}
        subprocess.run([sys.executable, "-m", "elmexport", *arguments], cwd=single, env=own, check=True, capture_output=True)
    assert contents(single) == contents(cell)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "3 jobs done before, 0 to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(LEAST + 'methods = ["mse", "gptq"]\n')
    done = run("sweep", "plan.toml", "--out", "out", "--dry-run")
    assert done.code == 0 and not (tmp_path / "out").exists()
    lines = done.out.splitlines()
    assert lines[1].split()[:4] == ["1", "OpenELM-tiny", "fp16", "reference"] and lines[-1] == "9 jobs to do, 0 done."
    (gguf,) = [line for line in lines if "gguf int8 gptq" in line]
    assert gguf.endswith("OpenELM-tiny fp16 reference; OpenELM-tiny onnx int8 gptq, whose codes or statistics it takes")


def test_bad_use(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.toml").write_text(LEAST)
    run("sweep", "gone.toml", "--out", "out").refused("cannot read the plan gone.toml")
    run("sweep", "plan.toml", "--out", "out", "--workers", 2, "--scheduler", "tcp://x:1").refused("leave one of them out")
    monkeypatch.setitem(sys.modules, "distributed", None)
    run("sweep", "plan.toml", "--out", "out").refused("dask.distributed, which is not installed; pip install 'elmexport[sweep]'", code=3)
    assert not (tmp_path / "out").exists()


def test_another_folder_is_not_taken(tmp_path: Path) -> None:
    from elmexport.errors import ElmExportError
    from elmexport.sweep.folder import open_folder

    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ElmExportError, match="holds something other than a sweep; choose another --out"):
        open_folder(tmp_path, "")
    with pytest.raises(ElmExportError, match="is a file; --out is the folder of the sweep"):
        open_folder(tmp_path / "thesis.txt", "")
    first = open_folder(tmp_path / "new", "a plan")
    assert open_folder(tmp_path / "new", "another") == first and (tmp_path / "new" / "plan.toml").read_text() == "another"
