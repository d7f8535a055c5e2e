"""Mixtures of experts in onnxruntime: exact in floats by either set of operators; in integers one node, the numbers of the codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from calibration.dequantized import Dequantized
from calibration.options import WeightOptions
from elmexport.artifact import Artifact
from elmexport.graph.forward import KVCaches, forward
from elmexport.inspection import inspect_artifact
from elmexport.models import trace
from elmexport.quantization.recipes import resolve
from elmexport.quantization.weight_source import CheckpointWeights
from elmexport.runtimes import open_artifact
from elmexport.target import find_target
from elmexport.weights import Role
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint
from tests.moe_models import SMALL, random_moe, some_ids, transformers_logits
from tests.reference import kl, log_probs

RTN = WeightOptions(method="rtn", calibrate="none")


@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return random_moe()


def logits_of(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Most tokens at once, the last eight one at a time."""
    runtime = open_artifact(folder)
    parts = [runtime.logits(ids[:-8])]
    parts += [runtime.logits(ids[place : place + 1], position=place) for place in range(len(ids) - 8, len(ids))]
    return np.concatenate(parts)


def operators(folder: Path) -> list[str]:
    (path,) = folder.glob("onnx/*.onnx")
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("ops", ["fast", "standard"])
def test_fp32_is_exact(checkpoint: MemoryCheckpoint, export_to: ExportTo, ops: str) -> None:
    folder, ids = export_to(checkpoint, "onnx", "fp32", settings={"ops": ops}), some_ids(SMALL)
    found, expected = logits_of(folder, ids), transformers_logits(checkpoint, ids)
    assert np.abs(log_probs(found) - log_probs(expected)).max() < 2e-3
    assert kl(expected, found).max() < 1e-9
    assert "QMoE" not in operators(folder)


@pytest.mark.parametrize("quant", ["int4", "int8", "int4-asym", "int4-all"])
def test_integers_are_one_node_a_layer(checkpoint: MemoryCheckpoint, export_to: ExportTo, quant: str) -> None:
    """Its result is that of the standard operators, which compute the same codes in float32, but for 8-bit products elsewhere."""
    fused = export_to(checkpoint, "onnx", quant, weights=RTN)
    assert operators(fused).count("QMoE") == SMALL.num_hidden_layers
    ids, plan = some_ids(SMALL), resolve(find_target("onnx").recipe(quant), SMALL)
    weights, graph = Dequantized(CheckpointWeights(checkpoint, plan, "rtn")), trace(SMALL)
    exact = forward(graph, lambda spec: weights[spec.name], torch.from_numpy(ids)[None], 0, KVCaches(graph))[0].numpy()
    original = forward(graph, lambda spec: checkpoint.tensor(spec.name), torch.from_numpy(ids)[None], 0, KVCaches(graph))[0].numpy()
    found = logits_of(fused, ids)
    # A token whose experts nearly tie may go elsewhere for a rounded product; the median does not see it.
    assert np.median(kl(exact, found)) < (0.2 if quant != "int8" else 1.0) * np.median(kl(original, exact))
    assert np.median(kl(exact, found)) < 0.02


def test_standard_operators_hold_the_same_codes(checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    ids, plan = some_ids(SMALL), resolve(find_target("onnx").recipe("int4"), SMALL)
    folder = export_to(checkpoint, "onnx", "int4", weights=RTN, settings={"ops": "standard"})
    weights, graph = Dequantized(CheckpointWeights(checkpoint, plan, "rtn")), trace(SMALL)
    exact = forward(graph, lambda spec: weights[spec.name], torch.from_numpy(ids)[None], 0, KVCaches(graph))[0].numpy()
    assert np.median(kl(exact, logits_of(folder, ids))) < 0.002  # onnxruntime makes 8-bit products of them


def test_experts_of_two_schemes_need_no_common_node(checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path) -> None:
    """Mixtures are computed expert by expert: the one node takes no two."""
    base = find_target("onnx").recipe("int4").to_dict()
    for down in ("int8-block32", "int4-block16", "fp32"):
        recipe = tmp_path / f"{down}.toml"
        lines = [f"{key} = {json.dumps(value)}" for key, value in base.items() if key != "rule"]
        lines += ["[[rule]]", 'roles = ["moe.experts.down"]', f'scheme = "{down}"', "[[rule]]", 'scheme = "int4-block32"']
        recipe.write_text("\n".join(lines).replace('"int4"', f'"{down}"', 1), encoding="utf-8")
        folder = export_to(checkpoint, "onnx", str(recipe), weights=RTN, verify=True)
        assert "QMoE" not in operators(folder)
        assert (Artifact.open(folder).manifest.self_check.kl_mean or 1.0) < 0.3


def test_the_residual_scale_is_exact(checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    """A stream that fp16 could not hold: the experts' sum takes its factor."""
    large = MemoryCheckpoint(SMALL, checkpoint.arrays, name="large")
    large.arrays = {
        name: array * (2.0**14 if large.specs[name].role.writes_to_stream else 1.0) for name, array in checkpoint.arrays.items()
    }
    folder = export_to(large, "onnx", "fp16", verify=True)
    manifest = Artifact.open(folder).manifest
    assert manifest.alpha < 1
    assert (manifest.self_check.kl_mean or 1.0) < 0.01


def test_inspect_lists_stacks(checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    tensors = {
        tensor.name: tensor for tensor in inspect_artifact(export_to(checkpoint, "onnx", "int4", weights=RTN), tensors=True).tensors or ()
    }
    gate_up = tensors["model.layers.1.mlp.experts.*.gate_proj.weight"]
    assert (gate_up.role, gate_up.shape, gate_up.scheme) == (Role.MOE_EXPERTS_GATE, (6, 2 * 96, 128), "int4 in blocks of 32")
    assert gate_up.bytes == 6 * 192 * 128 // 2 + 6 * 192 * 128 // 32 * 4
    down = tensors["model.layers.1.mlp.experts.*.down_proj.weight"]
    assert (down.role, down.shape) == (Role.MOE_EXPERTS_DOWN, (6, 128, 96))
    assert tensors["model.layers.1.mlp.gate.weight"].scheme == "float32 transposed"


def test_an_expert_without_tokens(export_to: ExportTo) -> None:
    """Empty products are products, too."""
    checkpoint = random_moe(replace(SMALL, num_experts=40, num_experts_per_tok=1))
    folder, ids = export_to(checkpoint, "onnx", "fp32"), some_ids(SMALL, 9)
    expected = transformers_logits(checkpoint, ids)
    assert kl(expected, logits_of(folder, ids)).max() < 1e-9


def test_accuracy_level_may_be_set_afterwards(checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    """As docs/experts.md says: the same function in 8-bit products, from onnxruntime 1.31 on."""
    folder, ids = export_to(checkpoint, "onnx", "int4", weights=RTN), some_ids(SMALL)
    (path,) = folder.glob("onnx/*.onnx")
    before = open_artifact(path).logits(ids)
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "QMoE":
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
    onnx.save(model, path)
    after = open_artifact(path).logits(ids)
    assert not np.array_equal(before, after)
    assert np.median(kl(before, after)) < 0.01
