"""Weights as an artifact holds them: streamed, cast or quantized, and refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from elmexport.errors import ElmExportError
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.recipes import Recipe, Rule, resolve
from elmexport.quantization.schemes import Float, find_scheme
from elmexport.quantization.weight_source import CheckpointWeights, cast
from tests.memory_checkpoint import MemoryCheckpoint

QKV = "transformer.layers.1.attn.qkv_proj.weight"


def planned(checkpoint: MemoryCheckpoint, scheme: str, **changed: np.ndarray) -> CheckpointWeights:
    """`checkpoint` with some arrays replaced, everything but norms in `scheme`."""
    recipe = Recipe("test", "for tests", Float("fp32"), Float("fp32"), Float("fp16"), Float("fp16"), 1.0, (Rule(find_scheme(scheme)),))
    copy = MemoryCheckpoint(checkpoint.config, checkpoint.arrays | changed)
    return CheckpointWeights(copy, resolve(recipe, checkpoint.config))


def with_value(checkpoint: MemoryCheckpoint, value: float) -> dict[str, np.ndarray]:
    array = checkpoint.arrays[QKV].copy()
    array[3, 7] = value
    return {QKV: array}


@pytest.mark.parametrize("scheme", ["int4-block32", "int8-block32"])
def test_quantized_times_alpha(small_checkpoint: MemoryCheckpoint, scheme: str) -> None:
    weights = planned(small_checkpoint, scheme)
    spec = small_checkpoint.specs[QKV]
    plain, scaled = weights.get(spec), weights.scaled(spec, 2.0**-3)
    assert isinstance(plain, IntegerTensor) and isinstance(scaled.weight, IntegerTensor) and scaled.rest == 1
    assert torch.equal(scaled.weight.codes, plain.codes)
    assert torch.equal(scaled.weight.dequantize(), plain.dequantize() / 8)


@pytest.mark.parametrize(
    ("scheme", "factor"), [("int4-block32", 2.0**-20), ("int8-channel", 2.0**-20), ("lut4-group8", 2.0**-20), ("int4-block32", 2.0**30)]
)
def test_a_factor_that_the_scales_cannot_take_is_left_over(small_checkpoint: MemoryCheckpoint, scheme: str, factor: float) -> None:
    weights = planned(small_checkpoint, scheme)
    spec = small_checkpoint.specs[QKV]
    found, plain = weights.scaled(spec, factor), weights.get(spec)
    assert not isinstance(found.weight, torch.Tensor) and not isinstance(plain, torch.Tensor)
    assert found.rest == factor
    assert torch.equal(found.weight.dequantize(), plain.dequantize())


def test_types_of_the_target_s_own_ask_for_the_numbers(small_checkpoint: MemoryCheckpoint) -> None:
    weights = planned(small_checkpoint, "ggml-q8_0")
    spec = small_checkpoint.specs[QKV]
    assert torch.equal(weights.numbers(spec), small_checkpoint.tensor(QKV))
    with pytest.raises(AssertionError, match="quantized by the target"):
        weights.get(spec)


@pytest.mark.parametrize(("scheme", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_float_times_alpha(small_checkpoint: MemoryCheckpoint, scheme: str, dtype: torch.dtype) -> None:
    found = planned(small_checkpoint, scheme).scaled(small_checkpoint.specs[QKV], 0.25)
    assert found.rest == 1 and isinstance(found.weight, torch.Tensor)
    assert torch.equal(found.weight, (torch.from_numpy(small_checkpoint.arrays[QKV]) / 4).to(dtype))


def test_norms_stay_as_the_recipe_says(small_checkpoint: MemoryCheckpoint) -> None:
    name = "transformer.norm.weight"
    found = planned(small_checkpoint, "int4-block32").get(small_checkpoint.specs[name])
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), small_checkpoint.arrays[name])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", ["fp32", "int4-block32"])
def test_non_finite_weights_are_refused_by_name(small_checkpoint: MemoryCheckpoint, scheme: str, value: float) -> None:
    weights = planned(small_checkpoint, scheme, **with_value(small_checkpoint, value))
    with pytest.raises(ElmExportError, match=rf"{QKV} holds 1 values that are NaN or infinite, of \d+"):
        weights.get(small_checkpoint.specs[QKV])


@pytest.mark.parametrize("scheme", ["int4-block32", "int8-block32"])
def test_a_scale_out_of_range_names_the_tensor(small_checkpoint: MemoryCheckpoint, scheme: str) -> None:
    weights = planned(small_checkpoint, scheme, **with_value(small_checkpoint, 1e7))
    with pytest.raises(ElmExportError, match=rf"{QKV}: .*fp16's 65504"):
        weights.get(small_checkpoint.specs[QKV])


def test_fp16_overflow_is_refused_and_the_fix_named(small_checkpoint: MemoryCheckpoint) -> None:
    weights = planned(small_checkpoint, "fp16", **with_value(small_checkpoint, 70000.0))
    with pytest.raises(ElmExportError, match=rf"{QKV} reaches 7e\+04 in row \d+, beyond fp16's 65504; export with bf16 or fp32 weights"):
        weights.get(small_checkpoint.specs[QKV])


def test_bf16_holds_what_fp16_cannot() -> None:
    assert torch.isfinite(cast(torch.tensor([1e30]), Float("bf16"), "x")).all()


def test_a_fallback_tensor_comes_as_the_fallback_says(small_checkpoint: MemoryCheckpoint) -> None:
    config = replace(small_checkpoint.config, ffn_dim_divisor=8, ffn_multipliers=(0.5, 1.0, 1.25))
    from tests.memory_checkpoint import random_checkpoint

    weights = planned(random_checkpoint(config), "int4-block32")
    found = weights.get({spec.name: spec for spec in config.weights()}["transformer.layers.2.ffn.proj_2.weight"])
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float16
