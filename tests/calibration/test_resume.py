"""Calibration to a file: interrupted runs go on and give the same bytes; nothing half-written, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from calibration.calibrate import calibrate_checkpoint, make_sample
from calibration.collect import collect
from calibration.text import Sample
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.progress import SilentProgress
from tests.calibration.test_collect import sample_of
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint


class Interrupted(Exception):
    pass


class StopAfter(SilentProgress):
    """Ends the run, as Ctrl-C would, at its n-th batch."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def advance(self, n: int) -> None:
        self.left -= 1
        if not self.left:
            raise Interrupted


@pytest.fixture(scope="module")
def sample(small_checkpoint: MemoryCheckpoint) -> Sample:
    return sample_of(small_checkpoint.config, windows=40, window=128)  # three batches


@pytest.fixture(scope="module")
def whole(small_checkpoint: MemoryCheckpoint, sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "statistics"
    calibrate_checkpoint(small_checkpoint, sample, out, hessian=True)
    assert [path.name for path in out.parent.iterdir()] == ["statistics"]
    return out.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "batches", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5, 10, 15))]
)  # of 5 stages of 3 batches: in the first, at an end, within a layer, in the last
def test_an_interrupted_run_goes_on(
    small_checkpoint: MemoryCheckpoint, sample: Sample, whole: bytes, tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "statistics"
    with pytest.raises(Interrupted):
        calibrate_checkpoint(small_checkpoint, sample, out, hessian=True, progress=StopAfter(batches))
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".statistics.calibrating-")

    asked: list[str] = []
    monkeypatch.setattr(small_checkpoint, "tensor", lambda name: (asked.append(name), small_checkpoint.read(name))[1])
    calibrate_checkpoint(small_checkpoint, sample, out, hessian=True)
    assert out.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [out]
    done = (batches - 1) // 3  # stages that were complete: the embedding, then the layers
    again = [name for name in small_checkpoint.specs if _stage(name) >= done]
    assert asked == again


def _stage(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) + 1 if parts[1] == "layers" else 4 if parts[1] == "norm" else 0


@pytest.mark.slow
def test_memory_gives_the_same(small_checkpoint: MemoryCheckpoint, sample: Sample, whole: bytes, tmp_path: Path) -> None:
    collect(small_checkpoint, sample, hessian=True).save(tmp_path / "statistics")
    assert (tmp_path / "statistics").read_bytes() == whole


@pytest.mark.slow
def test_what_belongs_to_another_run_is_not_used(small_checkpoint: MemoryCheckpoint, sample: Sample, whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "statistics"
    other = random_checkpoint(small_checkpoint.config, seed=1)
    for checkpoint, hessian in ((other, True), (small_checkpoint, False)):
        with pytest.raises(Interrupted):
            calibrate_checkpoint(checkpoint, sample, out, hessian=hessian, progress=StopAfter(8))
    assert len(list(tmp_path.iterdir())) == 1  # the second run removed what the first had left
    calibrate_checkpoint(small_checkpoint, sample, out, hessian=True)
    assert out.read_bytes() == whole and list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_existing_output(small_checkpoint: MemoryCheckpoint, sample: Sample, whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "statistics"
    out.write_text("precious")
    with pytest.raises(ElmExportError, match="exists already; pass --force"):
        calibrate_checkpoint(small_checkpoint, sample, out)
    with pytest.raises(Interrupted):
        calibrate_checkpoint(small_checkpoint, sample, out, hessian=True, force=True, progress=StopAfter(8))
    assert out.read_text() == "precious"
    calibrate_checkpoint(small_checkpoint, sample, out, hessian=True, force=True)
    assert out.read_bytes() == whole
    with pytest.raises(ElmExportError, match="is a folder"):
        calibrate_checkpoint(small_checkpoint, sample, tmp_path, force=True)


def test_bad_weights_leave_nothing(small_checkpoint: MemoryCheckpoint, sample: Sample, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(small_checkpoint.config)
    checkpoint.arrays["transformer.layers.2.ffn.proj_2.weight"][0, 0] = float("nan")
    with pytest.raises(ElmExportError, match=r"layers\.2\.ffn\.proj_2\.weight holds 1 values that are NaN"):
        calibrate_checkpoint(checkpoint, sample, tmp_path / "statistics")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(small_checkpoint: MemoryCheckpoint, sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ElmExportError, match=r"cannot write .*file/statistics: Not a directory"):
        calibrate_checkpoint(small_checkpoint, sample, tmp_path / "file" / "statistics")


@pytest.mark.slow
def test_a_killed_process(tiny: Checkpoint, tmp_path: Path) -> None:
    """Killed in the middle of a layer; the command run again gives what an undisturbed run gives."""
    out = tmp_path / "statistics"
    command = [sys.executable, "-m", "elmexport", "calibrate", "--tokens", "8192", "--hessian", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not list(tmp_path.glob("*/.stream-3.partial-*")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert not out.exists()
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.glob("part-*")} == {"part-0.safetensors", "part-1.safetensors"}

    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert list(tmp_path.iterdir()) == [out]
    undisturbed = tmp_path / "undisturbed"
    calibrate_checkpoint(tiny, make_sample(tiny, tokens=8192), undisturbed, hessian=True)
    assert out.read_bytes() == undisturbed.read_bytes()
