"""Codes that were fitted to a text that says too little are not taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration import guard
from calibration.options import WeightOptions
from calibration.weight_set import WeightSet
from elmexport.checkpoint.base import Checkpoint
from elmexport.exporting import ExportResult, export_checkpoint
from elmexport.files import MappedTensors
from tests.memory_checkpoint import MemoryCheckpoint

POOR = {"one word": "hello", "one letter": "a " * 3000}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def exported(model: Checkpoint, out: Path, text: Path | None = None, **options: object) -> ExportResult:
    weights = WeightOptions(calibrate=text or "auto", **options)  # type: ignore[arg-type]
    return export_checkpoint(model, "mlx", "int4", out=out, weights=weights, verify=False)


@pytest.fixture(scope="module")
def plain(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> MappedTensors:
    """Codes by mse."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELMEXPORT_CACHE", str(folder / "cache"))
        exported(tiny, folder / "artifact")
    return MappedTensors(folder / "artifact" / "model.safetensors", "")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "method"), [("one word", "gptq"), ("one letter", "awq")])
def test_a_poor_text_gives_mse_s_codes(tiny: Checkpoint, plain: MappedTensors, tmp_path: Path, case: str, method: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(POOR[case])
    found = exported(tiny, tmp_path / "found", text, method=method)
    assert any(note.startswith(f"--method {method} lost more on text that it had not read than mse loses") for note in found.notes)
    assert found.manifest.quant.method == "mse" and found.manifest.quant.held_out is not None
    ours = MappedTensors(tmp_path / "found" / "model.safetensors", "")
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_a_good_text_keeps_them_and_says_what_they_lose(
    small_checkpoint: MemoryCheckpoint, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exported(small_checkpoint, tmp_path / "a", method="gptq", tokens=1024)
    held_out = found.manifest.quant.held_out
    assert found.manifest.quant.method == "gptq" and held_out is not None
    assert 0 < held_out.kl < held_out.mse_kl
    monkeypatch.setattr(guard, "KLEvaluator", lambda *_: pytest.fail("measured again"))
    assert exported(small_checkpoint, tmp_path / "b", method="gptq", tokens=1024).manifest.quant.held_out == held_out


@pytest.mark.slow
def test_saved_weights_are_the_ones_taken(tiny: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(POOR["one word"])
    kept = tmp_path / "kept.safetensors"
    exported(tiny, tmp_path / "a", text, method="gptq", save_weights_to=kept)
    assert WeightSet.load(kept).facts.method == "mse"
    again = exported(tiny, tmp_path / "b", weights_from=kept)
    assert again.manifest.quant.method == "mse"
    first, second = (MappedTensors(tmp_path / name / "model.safetensors", "") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
