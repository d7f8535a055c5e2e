"""`verify.py` as it lies in an artifact, run with a fake of Core ML (`tests.fake_core_ml`); and the golden file that it reads."""

from __future__ import annotations

import json
import re
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elmexport.artifact import Artifact
from elmexport.checkpoint.base import Checkpoint
from tests.conftest import ExportTo
from tests.fake_core_ml import FakeMLModel, fake_coremltools
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import reference_logits

pytestmark = pytest.mark.slow

FORMS = [
    {},
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in ({"kv": "io"}, {"argmax": True}, {"prefill": 32}, {"device": "gpu"}, {"max_package_mb": 2.0})
    ),
    pytest.param({"kv": "io", "max_package_mb": 2.0, "argmax": True}, marks=pytest.mark.slow),
]


@cache
def artifact(checkpoint: Checkpoint, export_to: ExportTo) -> Path:
    return export_to(checkpoint, "coreml", "int4", verify=True)


def verify(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setitem(sys.modules, "coremltools", fake_coremltools())
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["verify.py", "--repeat", "1", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / "verify.py"), run_name="__main__")
    return int(ended.value.code or 0), capsys.readouterr().out


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_every_form_passes(
    tiny: Checkpoint, export_to: ExportTo, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_to(tiny, "coreml", "int4", settings=settings, verify=True)
    FakeMLModel.units.clear()
    code, out = verify(folder, monkeypatch, capsys, "--compute-units", "cpu_and_ne")
    assert code == 0, out
    assert FakeMLModel.units == {"CPU_AND_NE"}
    # The stand-in runs what the self-check ran: what it gives is the golden file's, but for the order of sums.
    other = re.search(r"from the check of the export: +([\d.e+-]+), ([\d.e+-]+), (\d+) of (\d+)", out)
    assert other is not None, out
    assert float(other[2]) < 1e-3 and other[3] == other[4] == ("8" if settings.get("prefill") == 32 else "6")
    assert re.search(r"^prefill: [\d.]+ tokens/s .*\ndecode: [\d.]+ tokens/s", out, re.MULTILINE)
    assert Artifact.open(folder).verify() == []


def test_a_package_that_says_something_else_fails(
    tiny: Checkpoint, export_to: ExportTo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = artifact(tiny, export_to)
    monkeypatch.setattr(FakeMLModel, "noise", 8.0)
    code, out = verify(folder, monkeypatch, capsys)
    assert (code, "FAILED: the export allowed a mean of 0.5" in out) == (1, True)


def test_a_golden_file_of_another_export(
    tiny: Checkpoint, export_to: ExportTo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = artifact(tiny, export_to)
    for name in ("verify.py", "manifest.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "OpenELM-tiny-int4.mlpackage").symlink_to(source / "OpenELM-tiny-int4.mlpackage")
    with np.load(source / "golden.npz") as file:
        golden = dict(file)
    np.savez(tmp_path / "golden.npz", **golden | {"positions": golden["positions"] - 1})
    code, out = verify(tmp_path, monkeypatch, capsys)
    assert (code, "it belongs to another export" in out) == (1, True)


def test_not_on_a_mac(tiny: Checkpoint, export_to: ExportTo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = artifact(tiny, export_to)
    monkeypatch.setattr(sys, "argv", ["verify.py"])
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / "verify.py"), run_name="__main__")
    assert ended.value.code == 3
    assert "Core ML runs on macOS only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("context", "positions"), [(128, [63, 123, 124, 125, 126, 127]), (96, [63, 92, 93, 94, 95]), (32, [27, 28, 29, 30, 31])]
)
def test_the_golden_file_holds_what_the_model_says(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, context: int, positions: list[int]
) -> None:
    folder = export_to(small_checkpoint, "coreml", "fp16", context=context, verify=True)
    with np.load(folder / "golden.npz") as golden:
        assert golden["positions"].tolist() == positions
        assert golden["decoded"] == 4
        wanted = reference_logits(small_checkpoint.config, small_checkpoint.arrays, golden["ids"])[positions]
        np.testing.assert_allclose(golden["model"], wanted, rtol=0, atol=1e-4)
        assert (golden["model"].dtype, golden["artifact"].dtype) == (np.float32, np.float16)
        difference = torch.log_softmax(torch.from_numpy(golden["artifact"].astype(np.float64)), -1) - torch.log_softmax(
            torch.from_numpy(wanted), -1
        )
        assert difference.abs().max() < 0.05


def test_no_golden_file_without_the_check(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    folder = export_to(small_checkpoint, "coreml", "fp16", verify=False)
    assert not (folder / "golden.npz").exists() and not (folder / "verify.py").exists()


def test_the_manifest_lists_both_files(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    listed = json.loads((export_to(small_checkpoint, "coreml", "fp16", verify=True) / "manifest.json").read_text())["files"]
    assert {"golden.npz", "verify.py"} <= set(listed)
