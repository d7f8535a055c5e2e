"""Foldings change weights and nothing else: the independent float64 forward pass gives the same logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.folding import FoldedCheckpoint, LayerFold, folded_moments, for_query_heads
from calibration.statistics import Moments
from elmexport.errors import ElmExportError
from elmexport.models.openelm.config import OpenELMConfig
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.reference import reference_logits

IDS = np.array([1, 17, 300, 42, 42, 511, 0, 8])


def scales(length: int, seed: int) -> Tensor:
    return torch.exp(torch.randn(length, generator=torch.Generator().manual_seed(seed)))


def fold_of(config: OpenELMConfig, layer: int, *names: str) -> LayerFold:
    dims = config.layers[layer]
    lengths = {"qkv": config.model_dim, "gate_up": config.model_dim, "down": dims.ffn_dim, "out": dims.kv_heads * config.head_dim}
    return LayerFold(**{name: scales(lengths[name], layer) for name in names})


def arrays(checkpoint: FoldedCheckpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.tensor(name).numpy() for name in checkpoint.specs}


@pytest.mark.parametrize("names", [("qkv",), ("gate_up",), ("down",), ("out",), ("qkv", "gate_up", "down", "out")], ids="+".join)
def test_the_function_stays_the_same(small_checkpoint: MemoryCheckpoint, names: tuple[str, ...]) -> None:
    config = small_checkpoint.config
    folded = FoldedCheckpoint(small_checkpoint, {layer: fold_of(config, layer, *names) for layer in range(3)})
    found = arrays(folded)
    changed = [name for name in found if not np.array_equal(found[name], small_checkpoint.arrays[name])]
    assert len(changed) == 3 * {1: 1 if names == ("out",) else 2, 4: 6}[len(names)] + (3 if names == ("out",) else 0)
    expected = reference_logits(config, small_checkpoint.arrays, IDS)
    # Each folded weight is rounded to float32 once or twice, 6e-8 of it.
    np.testing.assert_allclose(reference_logits(config, found, IDS), expected, rtol=0, atol=2e-5)


def test_powers_of_two_are_exact(small_checkpoint: MemoryCheckpoint) -> None:
    """With norms that are fp16 numbers, as published checkpoints' bf16 ones all but are, scales 2^n change no bit of the logits."""
    config = small_checkpoint.config
    copy = MemoryCheckpoint(
        config, {n: a.astype(np.float16).astype(np.float32) if a.ndim == 1 else a for n, a in small_checkpoint.arrays.items()}
    )
    folds = {}
    for layer in range(3):
        fold = fold_of(config, layer, "qkv", "gate_up", "down", "out")
        folds[layer] = LayerFold(**{name: getattr(fold, name).log2().round().exp2() for name in ("qkv", "gate_up", "down", "out")})
    found = reference_logits(config, arrays(FoldedCheckpoint(copy, folds)), IDS)
    np.testing.assert_array_equal(found, reference_logits(config, copy.arrays, IDS))


def test_folded_norms_are_numbers_of_fp16(small_checkpoint: MemoryCheckpoint) -> None:
    folded = FoldedCheckpoint(small_checkpoint, {0: fold_of(small_checkpoint.config, 0, "qkv", "gate_up")})
    for name in ("attn_norm", "ffn_norm"):
        norm = folded.tensor(f"transformer.layers.0.{name}.weight")
        assert torch.equal(norm.to(torch.float16).to(torch.float32), norm)
    spec = folded.specs["transformer.layers.0.attn.qkv_proj.weight"]
    scale = folded.input_scale(spec)
    assert scale is not None
    torch.testing.assert_close(scale, scales(small_checkpoint.config.model_dim, 0), rtol=2**-10, atol=0)


def test_norms_that_would_leave_fp16_are_not_folded(small_checkpoint: MemoryCheckpoint) -> None:
    config = small_checkpoint.config
    name = "transformer.layers.2.attn_norm.weight"
    norm = small_checkpoint.arrays[name].copy()
    norm[0], norm[1], norm[2], norm[3] = 0.0, -1.5, 1e-3, 1e3
    copy = MemoryCheckpoint(config, small_checkpoint.arrays | {name: norm})
    scale = torch.full((config.model_dim,), 2.0)
    scale[2], scale[3] = 1e4, 1e-3
    folded = FoldedCheckpoint(copy, {2: LayerFold(qkv=scale)})
    used = folded.input_scale(folded.specs["transformer.layers.2.attn.qkv_proj.weight"])
    assert used is not None
    assert used[:5].tolist() == [1.0, 2.0, 1.0, 1.0, pytest.approx(2.0, rel=2**-10)]
    assert folded.tensor(name)[:4].tolist() == pytest.approx([0.0, -0.75, 1e-3, 1e3], rel=1e-6)
    expected = reference_logits(config, copy.arrays, IDS)
    np.testing.assert_allclose(reference_logits(config, arrays(folded), IDS), expected, rtol=0, atol=2e-5)


def test_query_heads_share_the_scales_of_their_kv_head(small_config: OpenELMConfig) -> None:
    """Layer 1: two KV heads of 32 channels, three query heads each."""
    scale = torch.arange(64.0)
    expected = torch.cat([scale[:32]] * 3 + [scale[32:]] * 3)
    assert torch.equal(for_query_heads(scale, small_config, 1), expected)


def test_moments_follow_the_inputs(small_checkpoint: MemoryCheckpoint) -> None:
    x = torch.randn(50, 192, generator=torch.Generator().manual_seed(0))
    folded = FoldedCheckpoint(small_checkpoint, {2: fold_of(small_checkpoint.config, 2, "qkv")})
    spec = folded.specs["transformer.layers.2.attn.qkv_proj.weight"]
    scale = folded.input_scale(spec)
    assert scale is not None

    def of(y: Tensor) -> Moments:
        return Moments(50, y.square().mean(0), y.abs().mean(0), y.T @ y / 50)

    found, expected = folded.moments(spec, of(x)), of(x / scale)
    for name in ("mean_square", "mean_abs", "hessian"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    other = folded.specs["transformer.layers.2.ffn.proj_1.weight"]
    untouched = of(x)
    assert folded.moments(other, untouched) is untouched
    assert folded_moments(replace(of(x), mean_abs=None, hessian=None), scale).hessian is None


def test_a_folded_checkpoint_is_another_one(small_checkpoint: MemoryCheckpoint) -> None:
    config = small_checkpoint.config
    one = FoldedCheckpoint(small_checkpoint, {0: fold_of(config, 0, "qkv")})
    again = FoldedCheckpoint(small_checkpoint, {0: fold_of(config, 0, "qkv")})
    two = FoldedCheckpoint(small_checkpoint, {0: fold_of(config, 0, "qkv", "down")})
    assert one.identity() == again.identity()
    assert len({one.identity(), two.identity(), small_checkpoint.identity()}) == 3


@pytest.mark.parametrize(
    ("layer", "fold", "message"),
    [
        (3, LayerFold(), "a fold names layer 3; the model has layers 0 to 2"),
        (0, LayerFold(qkv=torch.ones(191)), r"layer 0: the scales of qkv have the shape \[191\]; it takes \[192\]"),
        (1, LayerFold(out=torch.ones(192)), r"layer 1: the scales of out have the shape \[192\]; it takes \[64\]"),
        (0, LayerFold(gate_up=torch.zeros(192)), "the scales of gate_up must be finite and above 0"),
        (0, LayerFold(qkv=torch.full((192,), torch.nan)), "the scales of qkv must be finite and above 0"),
    ],
)
def test_bad_folds_are_refused(small_checkpoint: MemoryCheckpoint, layer: int, fold: LayerFold, message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        FoldedCheckpoint(small_checkpoint, {layer: fold})


def test_without_a_gate_down_cannot_be_folded(small_config: OpenELMConfig) -> None:
    plain = random_checkpoint(replace(small_config, ffn_with_glu=False))
    with pytest.raises(ElmExportError, match="without a gate"):
        FoldedCheckpoint(plain, {0: fold_of(plain.config, 0, "down")})
    folded = FoldedCheckpoint(plain, {0: fold_of(plain.config, 0, "qkv", "gate_up", "out")})
    expected = reference_logits(plain.config, plain.arrays, IDS)
    np.testing.assert_allclose(reference_logits(plain.config, arrays(folded), IDS), expected, rtol=0, atol=2e-5)
