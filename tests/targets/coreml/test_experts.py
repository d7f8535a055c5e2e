"""Mixtures of experts are refused, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from elmexport.errors import ElmExportError
from elmexport.exporting import export_checkpoint
from tests.moe_models import random_moe


@pytest.mark.parametrize("device", ["neural-engine", "gpu"])
def test_core_ml_refuses_mixtures_of_experts(tmp_path: Path, device: str) -> None:
    checkpoint = random_moe()
    checkpoint.arrays.clear()  # nothing is read
    with pytest.raises(ElmExportError, match=r"no operation that computes only the experts .* Export it to onnx, gguf or mlx instead"):
        export_checkpoint(checkpoint, "coreml", "int4", out=tmp_path / "out", settings={"device": device})
    assert list(tmp_path.iterdir()) == []
