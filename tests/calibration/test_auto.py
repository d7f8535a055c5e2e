"""A method chosen by the time that it is estimated to take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration import budget
from calibration.budget import gptq_seconds
from calibration.options import WeightOptions
from calibration.preparation import prepare
from elmexport.checkpoint import open_checkpoint
from elmexport.errors import ElmExportError
from elmexport.progress import SilentProgress
from elmexport.quantization.recipes import resolve
from elmexport.target import find_target
from tests.memory_checkpoint import MemoryCheckpoint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_best_that_fits(small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine as slow as the budget makes it: half an hour's work for the whole text, some of that for less."""
    target = find_target("onnx")
    recipe = target.recipe("int4")
    whole, least = (gptq_seconds(small_checkpoint, resolve(recipe, small_checkpoint.config), tokens, 1.0) for tokens in (32768, 2048))
    monkeypatch.setattr(budget, "gemm_rate", lambda: whole / 1800)

    def chosen(minutes: float, tokens: int | None = None) -> tuple[str, int | None, str]:
        options = WeightOptions(method="auto", minutes=minutes, tokens=tokens)
        found = prepare(small_checkpoint, target, recipe, options, SilentProgress())
        text = found.facts["calibration"]
        return found.facts["method"], None if text is None else text["tokens"], found.notes[0]

    assert chosen(1800 * least / whole / 60 + 0.01)[:2] == ("gptq", 2048)
    assert chosen(0.1)[0] == "mse"
    assert "mse, for gptq along 2,048 tokens is estimated at" in chosen(0.1)[2] and "--time-budget" in chosen(0.1)[2]
    assert chosen(31, tokens=512)[:2] == ("gptq", 512)
    assert chosen(0.1, tokens=512)[0] == "mse"


def test_estimates_are_of_the_size_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """270M along 2,048 tokens took 98 s on a machine that multiplied at 140e9 operations a second, 450M along 8,192 255 s; docs/numbers.md."""
    monkeypatch.setattr("calibration.sequential.product_dtype", lambda device: torch.bfloat16)  # which that machine has
    for model, tokens, seconds in (("450M", 8192, 255), ("270M", 2048, 98)):
        checkpoint = open_checkpoint(model, random_weights=0)
        plan = resolve(find_target("onnx").recipe("int4"), checkpoint.config)
        assert gptq_seconds(checkpoint, plan, tokens, 140e9) == pytest.approx(seconds, rel=0.25)
    several = [gptq_seconds(checkpoint, plan, tokens, 140e9) for tokens in (2048, 8192, 32768)]
    assert several == sorted(several) and several[2] < 16 * several[0]


@pytest.mark.parametrize("options", [{"method": "gptq", "minutes": 5.0}, {"method": "auto", "minutes": 0.0}, {"minutes": 3.0}])
def test_a_budget_without_use(options: dict[str, object]) -> None:
    with pytest.raises(ElmExportError, match=r"--time-budget .* is in minutes, above 0, and for --method auto"):
        WeightOptions(**options)  # type: ignore[arg-type]
