"""What `elmexport inspect` says of an ONNX artifact: every weight once, at its size; and of one that was tampered with."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import onnx
import pytest

from elmexport.inspection import inspect_artifact
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.runtimes import open_artifact
from elmexport.weights import Role
from tests.conftest import ExportTo, SmallArtifact
from tests.memory_checkpoint import MemoryCheckpoint

SCHEMES = {
    ("fast", "fp32"): ("float32", "float32 transposed"),
    ("fast", "int4"): ("int8 in blocks of 32", "int4 in blocks of 32"),
    ("fast", "int4-all"): ("int4 in blocks of 32", "int4 in blocks of 32"),
    ("fast", "int4-asym"): ("int8 in blocks of 32", "int4 in blocks of 32 with zero points"),
    ("standard", "int4"): ("int8 in blocks of 32", "int4 in blocks of 32, transposed"),
    ("standard", "int4-asym"): ("int8 in blocks of 32", "uint4 in blocks of 32 with zero points, transposed"),
    ("standard", "int4-all"): ("int4 in blocks of 32", "int4 in blocks of 32, transposed"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("ops", "quant"), SCHEMES)
def test_tensors(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, small_config: OpenELMConfig, ops: str, quant: str) -> None:
    folder = export_to(small_checkpoint, "onnx", quant, settings={"ops": ops})
    inspection = inspect_artifact(folder, tensors=True)
    assert inspection.tensors is not None
    weights = [tensor for tensor in inspection.tensors if tensor.role is not None]
    schemes = {role: {tensor.scheme for tensor in weights if tensor.role is role} for role in (Role.EMBEDDING, Role.FFN_DOWN)}
    assert schemes == {Role.EMBEDDING: {SCHEMES[ops, quant][0]}, Role.FFN_DOWN: {SCHEMES[ops, quant][1]}}
    assert Counter(tensor.shape for tensor in weights) == Counter(spec.shape for spec in small_config.weights())
    graph = onnx.load(next(folder.glob("onnx/*.onnx")), load_external_data=False).graph
    lengths = [int(entry.value) for tensor in graph.initializer for entry in tensor.external_data if entry.key == "length"]
    inside = sum(tensor.bytes for tensor in inspection.tensors) - sum(lengths)
    assert inside == sum(8 * math.prod(tensor.dims) for tensor in graph.initializer if not tensor.external_data)  # int64 constants


@pytest.fixture
def copy(small_artifact: SmallArtifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_artifact("onnx", "int4"), tmp_path / "copy"))


@pytest.mark.parametrize("name", ["model_q4.onnx", "model_q4.onnx_data"])
def test_a_flipped_bit_is_found_by_the_hash(copy: Path, name: str) -> None:
    """Engines do not look for it: weights of another value are weights."""
    path = copy / "onnx" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert inspect_artifact(copy).problems == (f"onnx/{name} has been altered (its SHA-256 differs from the manifest's)",)
    if name.endswith("_data"):
        open_artifact(copy)
