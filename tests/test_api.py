"""The front door of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import elmexport
from elmexport.models.openelm.catalog import TINY_FOLDER

DOCUMENTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_export_open_evaluate(tmp_path: Path) -> None:
    result = elmexport.export("tiny", "onnx", "int4", out=tmp_path / "artifact")
    assert (result.path, result.manifest.quant.name) == (tmp_path / "artifact", "int4")
    with elmexport.open(result.path) as artifact:
        text = artifact.generate("It was a dark", max_tokens=8)
        assert text and text == artifact.generate("It was a dark", max_tokens=8, prompt_lookup=4)
        assert artifact.logits(artifact.encode("It was")).shape == (3, 4096)
        assert artifact.context == 256
    report = elmexport.evaluate(result.path, limit=5, text_tokens=64)
    assert report.tasks["cloze"].n == 5


def test_a_draft_model() -> None:
    with elmexport.open(TINY_FOLDER, draft_model="tiny") as artifact:
        logits = artifact.logits([1, 450])
        assert np.isfinite(logits).all()


def test_importing_costs_next_to_nothing() -> None:
    """Nothing but parts of the standard library: what is used is loaded when it is used."""
    code = "import sys, elmexport; print(*sorted({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=DOCUMENTS)
    assert set(done.stdout.split()) <= {"elmexport", "__main__"}
    assert {"export", "open", "evaluate"} <= set(dir(elmexport))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        elmexport.nothing  # type: ignore[attr-defined]  # noqa: B018
