"""The registry of methods: what the command line and the options know of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from calibration.facts import method_facts
from calibration.method import Job, Method, Prepared
from calibration.methods import DEFAULT, METHODS, find_method, methods_help
from calibration.options import WeightOptions
from calibration.preparation import prepare
from elmexport.errors import ElmExportError
from elmexport.progress import SilentProgress
from elmexport.quantization.weight_source import CheckpointWeights
from elmexport.target import find_target
from tests.memory_checkpoint import MemoryCheckpoint


def test_every_row_is_a_method() -> None:
    for name in METHODS:
        method = find_method(name)
        assert method.name == name and method.words in methods_help()
    assert find_method(DEFAULT).needs_text is False


def test_what_the_options_ask_of_them() -> None:
    assert [name for name in METHODS if find_method(name).needs_text] == ["gptq", "distill", "awq", "awq+gptq", "auto"]
    assert [name for name in METHODS if find_method(name).makes_weight_set] == ["gptq", "distill", "awq+gptq"]
    assert [name for name in METHODS if not find_method(name).takes_statistics] == ["distill", "auto"]


def test_an_unknown_one() -> None:
    with pytest.raises(ElmExportError, match=r"--method magic does not exist; choose mse, rtn, gptq, distill, awq, awq\+gptq"):
        find_method("magic")


def test_their_words_cost_no_heavy_import() -> None:
    code = "import sys; from calibration.methods import methods_help; methods_help(); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


class Toy(Method):
    """What a package's own method would be."""

    name = "toy"
    words = "for a test"

    def prepare(self, job: Job) -> Prepared:
        return Prepared(CheckpointWeights(job.checkpoint, job.plan, "rtn"), None, method_facts(self.name, None))


def test_a_method_is_a_module_and_a_row(small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", f"{__name__}:Toy")  # type: ignore[arg-type]
    target = find_target("onnx")
    found = prepare(small_checkpoint, target, target.recipe("int4"), WeightOptions(method="toy"), SilentProgress())
    assert found.facts == {"method": "toy", "calibration": None}
    with pytest.raises(ElmExportError, match="--method toy finds codes as it writes them; --save-weights is for --method gptq"):
        WeightOptions(method="toy", save_weights_to=Path("a.safetensors"))
