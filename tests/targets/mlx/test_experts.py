"""Mixtures of experts in MLX folders: stacked in `switch_mlp`, the numbers of their schemes, run by mlx-lm."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.options import WeightOptions
from elmexport.artifact import Artifact
from elmexport.inspection import inspect_artifact
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import resolve
from elmexport.quantization.schemes import CodedScheme
from elmexport.runtimes import open_artifact
from elmexport.target import find_target
from elmexport.weights import Role
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint
from tests.moe_models import SMALL, random_moe, some_ids, transformers_logits
from tests.reference import kl
from tests.targets.mlx.mlx_files import config, weights

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm")


@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return random_moe()


@pytest.mark.parametrize("quant", ["int4", "int8", "mxfp4"])
def test_stacks_hold_the_numbers_of_their_scheme(checkpoint: MemoryCheckpoint, export_to: ExportTo, quant: str) -> None:
    folder = export_to(checkpoint, "mlx", quant, weights=WeightOptions(method="rtn"))
    found, plan = weights(folder), resolve(find_target("mlx").recipe(quant), SMALL)
    for part in ("gate", "up", "down"):
        stack = found[f"model.layers.1.mlp.switch_mlp.{part}_proj.weight"]
        for expert in range(SMALL.num_experts):
            name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
            scheme = plan.schemes[name]
            assert isinstance(scheme, CodedScheme)
            assert np.array_equal(stack[expert], quantize(checkpoint.tensor(name), scheme, "rtn").dequantize().numpy())
    described = config(folder)
    assert described["tie_word_embeddings"] is False
    assert described["quantization"]["model.layers.0.mlp.gate"] is False  # the router


def test_mlx_lm_runs_it(checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    """fp16 numbers in float32 arithmetic, against transformers with the same numbers."""
    rounded = MemoryCheckpoint(
        SMALL, {name: array.astype(np.float16).astype(np.float32) for name, array in checkpoint.arrays.items()}, name="rounded"
    )
    folder, ids = export_to(rounded, "mlx", "fp16"), some_ids(SMALL)
    runtime = open_artifact(folder)
    parts = [runtime.logits(ids[:40]), *(runtime.logits(ids[place : place + 1], position=place) for place in range(40, 48))]
    assert kl(transformers_logits(rounded, ids), np.concatenate(parts)).max() < 1e-9


def test_the_residual_scale_is_exact(checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    """A stream that fp16 could not hold: the down projections take the factor, queries, keys and values another layer's."""
    arrays = {
        name: array * np.float32(2.0**14 if checkpoint.specs[name].role.writes_to_stream else 1.0)
        for name, array in checkpoint.arrays.items()
    }
    large = MemoryCheckpoint(SMALL, arrays, name="large")
    folder = export_to(large, "mlx", "fp16", verify=True)
    manifest = Artifact.open(folder).manifest
    assert manifest.alpha < 1
    assert (manifest.self_check.kl_mean or 1.0) < 0.01


def test_inspect_lists_stacks(checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    tensors = inspect_artifact(export_to(checkpoint, "mlx", "int4"), tensors=True).tensors or ()
    stack = next(tensor for tensor in tensors if tensor.name == "model.layers.2.mlp.switch_mlp.down_proj.weight")
    assert (stack.role, stack.shape) == (Role.MOE_EXPERTS_DOWN, (6, 128, 96))
