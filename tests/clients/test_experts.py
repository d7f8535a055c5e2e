"""The embedded mixture of experts in every format: transformers' logits from every engine; int4's codes are those of the other formats."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray

from calibration.dequantized import Dequantized
from calibration.options import WeightOptions
from elmexport.artifact import Artifact
from elmexport.checkpoint import open_checkpoint, open_tokenizer
from elmexport.graph.forward import KVCaches, forward
from elmexport.models import trace
from elmexport.quantization.recipes import resolve
from elmexport.quantization.weight_source import CheckpointWeights
from elmexport.runtimes import open_artifact
from elmexport.target import find_target
from tests.conftest import ExportTo
from tests.moe_models import transformers_logits
from tests.reference import kl, log_probs
from tests.targets.mlx.mlx_files import weights as mlx_weights

RTN = WeightOptions(method="rtn", calibrate="none")
# MLX has no fp32, but the checkpoint's own numbers are fp16, and CPUs compute in fp32.
FLOATS: list[tuple[str, str, dict[str, Any]]] = [
    ("onnx", "fp32", {}),
    ("onnx", "fp32", {"ops": "standard"}),
    ("gguf", "fp32", {}),
    ("mlx", "fp16", {}),
]


@cache
def prose() -> NDArray[np.int64]:
    """128 tokens of prose."""
    tokenizer = open_tokenizer(open_checkpoint("tiny-moe"))
    assert tokenizer is not None
    return np.array(tokenizer.encode((files("calibration") / "texts" / "weighting.txt").read_text(encoding="utf-8"))[:128])


@cache
def expected() -> NDArray[np.float64]:
    return transformers_logits(open_checkpoint("tiny-moe"), prose())


def logits(folder: Path) -> NDArray[np.float32]:
    """Most tokens at once, the last four one by one."""
    runtime, ids = open_artifact(folder), prose()
    parts = [runtime.logits(ids[:124]), *(runtime.logits(ids[place : place + 1], position=place) for place in range(124, 128))]
    return np.concatenate(parts)


def test_the_forward_pass_is_that_of_transformers() -> None:
    checkpoint = open_checkpoint("tiny-moe")
    graph, ids = trace(checkpoint.config), torch.from_numpy(prose())[None]
    found = forward(graph, lambda spec: checkpoint.tensor(spec.name), ids, 0, KVCaches(graph))[0].numpy()
    assert np.abs(log_probs(found) - log_probs(expected())).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("target", "quant", "settings"), FLOATS)
def test_every_format_gives_the_logits_of_transformers(export_to: ExportTo, target: str, quant: str, settings: dict[str, Any]) -> None:
    found = logits(export_to(open_checkpoint("tiny-moe"), target, quant, settings=settings))
    assert np.abs(log_probs(found) - log_probs(expected())).max() < 2e-3
    assert kl(expected(), found).max() < 1e-6


@pytest.mark.slow
def test_int4_is_the_same_in_all_formats(export_to: ExportTo) -> None:
    """Dequantized by each format's own reader, bit for bit, MLX's down projections up to alpha; ONNX's as onnxruntime computes with them."""
    checkpoint = open_checkpoint("tiny-moe")
    plan = resolve(find_target("onnx").recipe("int4"), checkpoint.config)
    ours = Dequantized(CheckpointWeights(checkpoint, plan, "rtn"))
    folder = export_to(checkpoint, "mlx", "int4", weights=RTN)
    mlx, alpha = mlx_weights(folder), Artifact.open(folder).manifest.alpha
    gguf = {tensor.name: tensor for tensor in GGUFReader(next(export_to(checkpoint, "gguf", "int4", weights=RTN).glob("*.gguf"))).tensors}
    for layer, part in ((0, "gate"), (1, "up"), (3, "down")):
        stack = np.stack([ours[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"].numpy() for expert in range(8)])
        assert np.array_equal(mlx[f"model.layers.{layer}.mlp.switch_mlp.{part}_proj.weight"], stack * (alpha if part == "down" else 1))
        tensor = gguf[f"blk.{layer}.ffn_{part}_exps.weight"]
        assert np.array_equal(dequantize(tensor.data, tensor.tensor_type).reshape(stack.shape), stack)
    graph, ids = trace(checkpoint.config), torch.from_numpy(prose())[None]
    exact = forward(graph, lambda spec: ours[spec.name], ids, 0, KVCaches(graph))[0].numpy()
    assert np.median(kl(exact, logits(export_to(checkpoint, "onnx", "int4", weights=RTN)))) < 1e-3
