"""The portable form: operators of ONNX itself alone, checked by its tools, run by its reference evaluator and by onnxruntime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from calibration.options import WeightOptions
from elmexport.checkpoint.base import Checkpoint
from elmexport.runtimes import open_artifact
from targets.onnx import OnnxTarget
from tests.clients.readers import Weights, quantized_weights
from tests.conftest import ExportTo
from tests.graph.test_forward import token_ids
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import kl, log_probs, reference_logits

QUANTS = OnnxTarget.quants
QUANTIZED = tuple(quant for quant in QUANTS if quant.startswith("int"))
LIMITS = {"fp16": 1e-3, "int8": 0.01, **dict.fromkeys(QUANTIZED[:-1], 0.5), "int4-all": 1.0}
Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> Exported:
    made: dict[str, Path] = {}

    def get(quant: str) -> Path:
        if quant not in made:
            made[quant] = export_to(small_checkpoint, "onnx", quant, context=64, settings={"ops": "standard"})
        return made[quant]

    return get


def load(folder: Path, *, data: bool = False) -> onnx.ModelProto:
    return onnx.load(next(folder.glob("onnx/*.onnx")), load_external_data=data)


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_only_operators_of_onnx(exported: Exported, quant: str) -> None:
    path = next(exported(quant).glob("onnx/*.onnx"))
    onnx.checker.check_model(path, full_check=True)
    model = load(exported(quant))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    count = Counter(node.op_type for node in model.graph.node)
    assert {"RMSNormalization", "RotaryEmbedding", "TensorScatter", "Attention"} <= set(count)
    assert all(node.domain == "" for node in model.graph.node)


@pytest.mark.parametrize("quant", ["int4", "int4-asym", "int8"])
def test_codes_are_stored_in_their_width(exported: Exported, quant: str) -> None:
    weights = {tensor.name: tensor for tensor in load(exported(quant)).graph.initializer}
    codes = [tensor for name, tensor in weights.items() if name.endswith("qkv_proj.weight.codes")]
    assert codes
    assert {tensor.data_type for tensor in codes} == {getattr(onnx.TensorProto, {"int4-asym": "UINT4"}.get(quant, quant.upper()))}


def dequantized(model: onnx.ModelProto) -> Weights:
    """What DequantizeLinear makes of the codes, as float32 `[out, in]`: blocks lie along the axis in which codes and scales differ."""
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights: Weights = {}
    for name in [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]:
        codes, scales = tensors[f"{name}.codes"].astype(np.float32), tensors[f"{name}.scales"]
        axis = 1 if codes.shape[0] == scales.shape[0] else 0
        block = codes.shape[axis] // scales.shape[axis]
        if f"{name}.zeros" in tensors:
            codes -= np.repeat(tensors[f"{name}.zeros"].astype(np.float32), block, axis)
        values = codes * np.repeat(scales, block, axis)
        weights[name] = values if axis == 1 else values.T
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int4", "int4-asym", "int4-all", "int8"])
def test_weights_are_those_of_the_fast_form(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, quant: str) -> None:
    def export(ops: str) -> Path:
        return export_to(small_checkpoint, "onnx", quant, weights=WeightOptions(calibrate="none"), settings={"ops": ops})

    fast = quantized_weights("onnx", export("fast"), small_checkpoint.config)
    found = dequantized(load(export("standard"), data=True))
    assert found.keys() == fast.keys()
    for name, array in fast.items():
        assert np.array_equal(found[name], array), name


@pytest.mark.parametrize("quant", QUANTS)
def test_logits_in_onnxruntime(exported: Exported, small_checkpoint: MemoryCheckpoint, quant: str) -> None:
    ids = token_ids(60, small_checkpoint.config)
    expected = reference_logits(small_checkpoint.config, small_checkpoint.arrays, ids)
    runtime = open_artifact(exported(quant))
    found = np.concatenate([runtime.logits(ids[:40]), *(runtime.logits(ids[i : i + 1], i) for i in range(40, 60))])
    if quant == "fp32":
        assert np.abs(log_probs(found) - log_probs(expected)).max() < 2e-3
    else:
        assert kl(expected, found).mean() < LIMITS[quant]


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp32", *QUANTIZED])
def test_tiny_in_the_reference_evaluator(tiny: Checkpoint, export_to: ExportTo, quant: str) -> None:
    folder = export_to(tiny, "onnx", quant, context=64, settings={"ops": "standard"})
    model = load(folder, data=True)
    ids = np.array([1, 385, 671, 277, 1826, 853, 361, 265, 1578])
    feed: dict[str, Any] = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64), "logits_to_keep": np.array(0)}
    for entry in model.graph.input:
        if entry.name.startswith("past_key_values."):
            feed[entry.name] = np.zeros([1, *(dim.dim_value for dim in entry.type.tensor_type.shape.dim[1:])], np.float32)
    (found,) = ReferenceEvaluator(model).run(["logits"], feed)
    expected = open_artifact(folder).logits(ids)
    assert kl(expected, found[0]).mean() < (1e-9 if quant == "fp32" else 2e-3)  # onnxruntime multiplies quantized weights in 8 bits
