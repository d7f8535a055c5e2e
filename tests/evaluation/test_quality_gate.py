"""From an artifact to a verdict: one that is broken on purpose fails, the same weights exported again pass."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import uses_external_data

from elmexport.checkpoint.base import Checkpoint
from elmexport.evaluation.evaluate import Settings, evaluate
from elmexport.evaluation.gates import GateFailure, Limits, check_gates, enforce
from elmexport.evaluation.results import Report
from tests.conftest import ExportTo

SETTINGS = Settings({"cloze": None}, limit=40)
LIMITS = Limits(max_drop=10, max_kl=0.05, max_ppl_ratio=1.1)


def double_scales(artifact: Path, layer: int) -> int:
    """Double the scales of every quantized matrix of `layer`, in the file itself; returns how many."""
    (model,) = artifact.glob("onnx/*.onnx")
    loaded = onnx.load(str(model), load_external_data=False)
    quantized = {
        node.input[2]: node.name for node in loaded.graph.node if node.op_type == "MatMulNBits" and f"layers_{layer}" in _dotless(node)
    }
    doubled = 0
    for tensor in loaded.graph.initializer:
        if tensor.name in quantized and uses_external_data(tensor):
            place = {entry.key: entry.value for entry in tensor.external_data}
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            data = np.memmap(model.parent / place["location"], dtype, "r+", int(place["offset"]), (int(place["length"]) // dtype.itemsize,))
            data *= dtype.type(2)
            data.flush()
            doubled += 1
    return doubled


def _dotless(node: onnx.NodeProto) -> str:
    return " ".join([node.name, *node.input]).replace(".", "_")


@pytest.fixture(scope="module")
def artifact(tiny: Checkpoint, export_to: ExportTo) -> Path:
    return export_to(tiny, "onnx", "int4")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(cache))


@pytest.fixture
def report(artifact: Path) -> Report:
    return evaluate(artifact, SETTINGS)


@pytest.mark.slow
def test_a_sound_artifact_passes(report: Report) -> None:
    assert report.kl is not None and 0.001 < report.kl.mean < 0.05
    checked = check_gates(report, LIMITS)
    enforce(checked)
    assert {gate.name for gate in checked.gates} == {"max-drop", "max-kl", "max-ppl-ratio"}


@pytest.mark.slow
def test_a_layer_with_doubled_scales_is_caught(report: Report, artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / artifact.name
    shutil.copytree(artifact, broken)
    assert double_scales(broken, 3) == 4
    found = check_gates(evaluate(broken, SETTINGS), LIMITS, baseline=report)
    with pytest.raises(GateFailure, match="mean KL divergence"):
        enforce(found)
    failed = {(gate.name, gate.task) for gate in found.gates if not gate.passed}
    assert {("max-kl", None), ("max-ppl-ratio", None), ("baseline-kl", None), ("baseline-perplexity", None)} <= failed


@pytest.mark.slow
def test_the_same_weights_exported_again_pass(
    report: Report, artifact: Path, tiny: Checkpoint, export_to: ExportTo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = export_to(tiny, "onnx", "int4")
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path))  # nothing is taken over from the first evaluation
    found = check_gates(evaluate(again, SETTINGS, against=str(artifact)), Limits(max_drop=0, max_kl=1e-7, max_ppl_ratio=1))
    enforce(found)
    assert found.tasks["cloze"].comparison is not None and found.tasks["cloze"].comparison.drop == 0
    assert found.kl is not None and found.kl.top1_agreement == 1
    against_fp16 = check_gates(evaluate(again, SETTINGS), LIMITS, baseline=report)
    enforce(against_fp16)
    assert [gate.value for gate in against_fp16.gates if gate.name.startswith("baseline")] == [0, 0, 0]
