"""What the next wider quantization would lose, as an export says it, against that quantization exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from elmexport.artifact import Artifact
from elmexport.checkpoint.base import Checkpoint
from elmexport.cli.describe import describe
from elmexport.evaluation.step_up import next_wider
from elmexport.exporting import export_checkpoint
from elmexport.quantization.recipes import resolve
from elmexport.target import find_target


@pytest.mark.parametrize(
    ("target", "quant", "expected"),
    [
        ("onnx", "int4", "int8"),
        ("onnx", "int8", "fp16"),
        ("onnx", "fp32", None),
        ("coreml", "int4", "int8"),  # lut6 has fewer bits, but tables take long to find
        ("mlx", "int3", "int4-group64"),
        ("gguf", "q4_k_m", "q5_0"),
        ("gguf", "fp16", "fp32"),
    ],
)
def test_the_next_wider(target: str, quant: str, expected: str | None, tiny: Checkpoint) -> None:
    chosen = find_target(target)
    found = next_wider(chosen, resolve(chosen.recipe(quant), tiny.config), tiny)
    assert (None if found is None else found[0]) == expected


@pytest.mark.slow
def test_what_is_said_is_what_the_wider_one_loses(tiny: Checkpoint, tmp_path: Path) -> None:
    narrow = export_checkpoint(tiny, "onnx", "int4", out=tmp_path / "a")
    check = narrow.manifest.self_check
    step = check.step_up
    assert step is not None and step.quant == "int8"
    wider = export_checkpoint(tiny, "onnx", "int8", out=tmp_path / "b").manifest
    assert wider.bits_per_weight == step.bits_per_weight
    # The engine rounds activations to 8 bits on top of what the weights lose, here more than they do.
    assert 0 < step.kl_mean < wider.self_check.kl_mean < check.kl_mean
    words = describe(Artifact.open(narrow.path))
    assert f"one step up, --quant int8 (9.02 bits per weight): {step.kl_mean:.3g}; at this size, try --method gptq" in words
    assert "one step up" in describe(Artifact.open(tmp_path / "b")) and "--method gptq" not in describe(Artifact.open(tmp_path / "b"))


@pytest.mark.slow
def test_nothing_is_lost_where_nothing_is_quantized(tiny: Checkpoint, tmp_path: Path) -> None:
    assert export_checkpoint(tiny, "onnx", "fp16", out=tmp_path / "a").manifest.self_check.step_up is None
