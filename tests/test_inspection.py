"""The tensors that `inspect_artifact` lists are all of the model's, and account for the size of the files."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from elmexport.artifact import Artifact
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.inspection import inspect_artifact, list_tensors
from elmexport.weights import Role
from tests.conftest import ExportTo, MadeOnce, SmallArtifact

SCHEMES = {
    ("gguf", "int4", Role.ATTENTION_QKV): "Q4_0",
    ("gguf", "int4", Role.EMBEDDING): "Q8_0",
    ("gguf", "fp16", Role.NORM_FFN): "F32",
    ("gguf", "fp16", Role.FFN_DOWN): "F16",
    ("onnx", "int4", Role.ATTENTION_QKV): "int4 in blocks of 32",
    ("onnx", "int4", Role.EMBEDDING): "int8 in blocks of 32",
    ("onnx", "fp16", Role.FFN_DOWN): "float16 transposed",
    ("mlx", "int4", Role.ATTENTION_QKV): "affine 4-bit, groups of 32",
    ("mlx", "int4", Role.EMBEDDING): "affine 8-bit, groups of 32",
    ("mlx", "fp16", Role.FFN_DOWN): "float16",
    ("coreml", "int4", Role.ATTENTION_QKV): "int4 in blocks of 32",
    ("coreml", "fp16", Role.FFN_DOWN): "float16",
    ("coreml", "lut6", Role.ATTENTION_QKV): "uint6 indices, a table for every 16 output channels",
    ("coreml", "lut6", Role.EMBEDDING): "int8 per output channel",
    ("coreml", "lut8", Role.FFN_DOWN): "uint8 indices, one table",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "quant"), [*product(("onnx", "coreml", "gguf", "mlx"), ("int4", "fp16")), *product(["coreml"], ("lut4", "lut6", "lut8"))]
)
def test_lists_the_whole_model(target: str, quant: str, tiny: Checkpoint, tiny_artifact: MadeOnce) -> None:
    path = tiny_artifact(target, quant)
    inspection = inspect_artifact(path, tensors=True)
    assert inspection.problems == ()
    assert inspection.tensors is not None
    weights = [tensor for tensor in inspection.tensors if tensor.role is not None]
    elements: Counter[Role] = Counter()
    for tensor in weights:
        assert tensor.role is not None
        elements[tensor.role] += math.prod(tensor.shape)
        expected = SCHEMES.get((target, quant, tensor.role))
        assert expected is None or tensor.scheme == expected, tensor
    expected_elements: Counter[Role] = Counter()
    for spec in tiny.config.weights():
        expected_elements[spec.role] += spec.size
    assert elements == expected_elements
    stored = sum(tensor.bytes for tensor in inspection.tensors)
    files = sum(facts.bytes for name, facts in inspection.artifact.manifest.files.items() if "tokenizer" not in name)
    assert 0.85 * files < stored <= files


@pytest.mark.slow
def test_coremltools_leaves_a_package_as_it_was(tiny: Checkpoint, export_to: ExportTo) -> None:
    """It writes the package's manifest anew when it opens one; whoever does that has not tampered with the artifact."""
    coremltools = pytest.importorskip("coremltools", reason="pip install coremltools")
    path = export_to(tiny, "coreml", "int4")
    coremltools.utils.load_spec(str(next(path.glob("*.mlpackage"))))
    assert inspect_artifact(path).problems == ()


def test_a_file_whose_facts_are_of_another_kind(small_artifact: SmallArtifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_artifact("mlx", "int4"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["bits"] = "four"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ElmExportError, match=r"the files in .* are damaged \(TypeError: "):
        list_tensors(Artifact.open(folder))
