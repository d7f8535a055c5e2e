"""AWQ of mixtures of experts: foldings leave the logits of transformers' class as they are, scales are searched on all that share them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from calibration.awq import awq_folds, awq_model
from calibration.calibrated import moments_of
from calibration.collect import collect
from calibration.dequantized import Dequantized
from calibration.folding import FoldedCheckpoint, LayerFold
from calibration.gptq import output_error
from calibration.guard import held_out_sample
from calibration.options import WeightOptions
from calibration.sensitivity import KLEvaluator
from calibration.statistics import Statistics, mean_square_of
from calibration.text import Sample, bundled_sample
from calibration.weight_set import WeightSet
from elmexport.artifact import Artifact
from elmexport.checkpoint import open_checkpoint, open_tokenizer
from elmexport.errors import ElmExportError
from elmexport.exporting import export_checkpoint
from elmexport.manifest import Manifest
from elmexport.models.olmoe.config import OlmoeConfig
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import resolve
from elmexport.quantization.schemes import CodedScheme, find_scheme
from elmexport.quantization.weight_source import CheckpointWeights
from elmexport.target import find_target
from elmexport.weights import Role, WeightSpec
from tests.memory_checkpoint import MemoryCheckpoint
from tests.moe_models import SMALL, TOKENIZER, random_moe, some_ids, transformers_logits

FOLDS = ("qkv", "gate_up", "down", "out")
BLOCKS = find_scheme("int4-block32")
LOUD = slice(None, None, 16)  # channels
NOT_QUANTIZED = (Role.NORM_ATTENTION, Role.NORM_FFN, Role.MOE_ROUTER)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))
    yield


def fold_of(config: OlmoeConfig, seed: int, *names: str, spread: float = 1.0) -> LayerFold:
    shapes = {
        "qkv": (config.hidden_size,),
        "gate_up": (config.hidden_size,),
        "down": (config.num_experts, config.intermediate_size),
        "out": (config.num_key_value_heads * config.head_dim,),
    }
    generator = torch.Generator().manual_seed(seed)
    return LayerFold(**{name: (spread * torch.randn(shapes[name], generator=generator)).exp() for name in names})


def in_memory(checkpoint: FoldedCheckpoint) -> MemoryCheckpoint:
    """A checkpoint of its own, with the folded weights and the embedded tokenizer."""
    arrays = {name: checkpoint.tensor(name).float().numpy() for name in checkpoint.specs}
    return MemoryCheckpoint(checkpoint.config, arrays, name="folded", tokenizer_path=TOKENIZER)


def random_sample(config: OlmoeConfig, windows: int, tokens: int) -> Sample:
    return Sample(np.stack([some_ids(config, tokens, seed) for seed in range(windows)]), "random ids")


@cache
def loud_moe() -> MemoryCheckpoint:
    """Random weights, where every sixteenth input of all matrices of the layers is ten times as large as the others."""
    checkpoint = random_moe()
    for name, spec in checkpoint.specs.items():
        if spec.role in (Role.NORM_ATTENTION, Role.NORM_FFN, Role.ATTENTION_V, Role.MOE_EXPERTS_UP):
            checkpoint.arrays[name][LOUD] *= 10
    return checkpoint


@cache
def loud_statistics(hessian: bool = True) -> Statistics:
    return collect(loud_moe(), random_sample(SMALL, 8, 64), hessian=hessian)


def is_of_layer(spec: WeightSpec) -> bool:
    return spec.layer is not None and spec.role.is_quantized


@pytest.mark.parametrize(
    ("names", "changed"),
    [
        (("qkv",), 4),  # norm, queries, keys, values
        (("gate_up",), 2 + 2 * 6),  # norm, router; gate and up of 6 experts
        (("down",), 2 * 6),
        (("out",), 2),
        (FOLDS, 4 + 2 + 3 * 6 + 1),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_function_stays_the_same(names: tuple[str, ...], changed: int, kv_heads: int) -> None:
    config = replace(SMALL, num_key_value_heads=kv_heads)
    checkpoint, ids = random_moe(config), some_ids(config)
    folded = FoldedCheckpoint(checkpoint, {layer: fold_of(config, layer, *names) for layer in range(3)})
    found = [name for name in folded.specs if not np.array_equal(folded.tensor(name).numpy(), checkpoint.arrays[name])]
    assert len(found) == 3 * changed
    # Each folded weight is rounded to float32 once or twice, 6e-8 of it.
    np.testing.assert_allclose(transformers_logits(folded, ids), transformers_logits(checkpoint, ids), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_the_scales_found_for_tiny_moe_leave_its_logits() -> None:
    checkpoint = open_checkpoint("tiny-moe")
    sample = bundled_sample(open_tokenizer(checkpoint), checkpoint.config, "calibration", tokens=1024, window=256)
    folds = awq_folds(checkpoint, lambda spec: BLOCKS, collect(checkpoint, sample))
    assert all(getattr(folds[layer], name) is not None for layer in range(4) for name in ("down", "out"))
    ids = sample.ids[0, :128]
    found, expected = transformers_logits(FoldedCheckpoint(checkpoint, folds), ids), transformers_logits(checkpoint, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("hessian", [True, False])
def test_loud_channels_cost_less(hessian: bool) -> None:
    """Of the matrices that share a scale together, each by its own tokens; measured by full Hessians whatever the search knew."""
    checkpoint, scheme, full = loud_moe(), BLOCKS, loud_statistics()
    assert isinstance(scheme, CodedScheme)
    folded = FoldedCheckpoint(checkpoint, awq_folds(checkpoint, lambda spec: scheme, loud_statistics(hessian)))
    errors: dict[Role, list[float]] = {}
    for spec in filter(is_of_layer, checkpoint.specs.values()):
        for number, model in enumerate((checkpoint, folded)):
            moments, weight = moments_of(model, full)(spec), model.tensor(spec.name)
            assert moments is not None and moments.hessian is not None
            error = weight - quantize(weight, scheme, "mse", moments.mean_square).dequantize()
            errors.setdefault(spec.role, [0.0, 0.0])[number] += moments.tokens * output_error(error, moments.hessian)
    assert len(errors) == 7
    for role, (before, after) in errors.items():
        assert after < 0.8 * before, (role, before, after)


@pytest.mark.slow
def test_experts_that_no_token_reached_have_no_say() -> None:
    """They are folded with the others, keep their own scales at 1, and do not change those that are shared."""
    config = replace(SMALL, num_experts=40)
    checkpoint = random_moe(config)
    statistics = collect(checkpoint, random_sample(config, 1, 10))
    folds = awq_folds(checkpoint, lambda spec: BLOCKS, statistics)
    counts = statistics.routed(checkpoint.specs.values())
    other = MemoryCheckpoint(config, checkpoint.arrays)
    for layer, reached in counts.items():
        down = folds[layer].down
        assert 0 in reached and down is not None
        for expert, tokens in enumerate(reached):
            assert tokens or bool((down[expert] == 1).all())
            if not tokens:
                for part in ("gate_proj", "up_proj"):
                    other.arrays[f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"] **= 3
    again = awq_folds(other, lambda spec: BLOCKS, statistics)
    for layer, fold in folds.items():
        assert all(same(getattr(fold, name), getattr(again[layer], name)) for name in FOLDS)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def test_bad_folds_are_refused() -> None:
    with pytest.raises(ElmExportError, match=r"layer 1: the scales of down have the shape \[96\]; it takes \[6, 96\]"):
        FoldedCheckpoint(random_moe(), {1: LayerFold(down=torch.ones(96))})


@pytest.fixture(scope="module")
def uneven() -> MemoryCheckpoint:
    """`tiny-moe` with channels of very different sizes: the same function."""
    tiny = open_checkpoint("tiny-moe")
    assert isinstance(tiny.config, OlmoeConfig)
    return in_memory(FoldedCheckpoint(tiny, {layer: fold_of(tiny.config, layer, *FOLDS, spread=0.5) for layer in range(4)}))


def exported(checkpoint: MemoryCheckpoint, target: str, out: Path, **options: Any) -> Manifest:
    export_checkpoint(checkpoint, target, "int4", out=out, weights=WeightOptions(**options))
    return Artifact.open(out).manifest


@pytest.mark.slow
@pytest.mark.parametrize(("target", "method"), [("onnx", "awq+gptq"), ("gguf", "awq")])  # neither knows the other
def test_exports_lose_less_than_by_rounding(uneven: MemoryCheckpoint, target: str, method: str, tmp_path: Path) -> None:
    """As engines compute them, routers included."""
    plain = exported(uneven, target, tmp_path / "rtn", method="rtn", calibrate="none")
    found = exported(uneven, target, tmp_path / "found", method=method, tokens=2048)
    assert found.quant.method == method and found.quant.held_out is not None
    assert found.quant.held_out.kl < 0.9 * found.quant.held_out.mse_kl
    assert found.self_check.kl_mean is not None and plain.self_check.kl_mean is not None
    assert found.self_check.kl_mean < 0.8 * plain.self_check.kl_mean


@pytest.mark.slow
def test_weight_sets_hold_the_norms_and_routers(uneven: MemoryCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    export_checkpoint(
        uneven,
        "gguf",
        "int4",
        out=tmp_path / "first",
        verify=False,
        weights=WeightOptions(method="awq+gptq", tokens=1024, save_weights_to=path),
    )
    kept = WeightSet.load(path)
    assert set(kept.facts.folded) == {name for name, spec in uneven.specs.items() if spec.role in NOT_QUANTIZED}
    export_checkpoint(uneven, "gguf", "int4", out=tmp_path / "again", verify=False, weights=WeightOptions(weights_from=path))
    read = [{t.name: t.data for t in GGUFReader(next((tmp_path / run).glob("*.gguf"))).tensors} for run in ("first", "again")]
    assert all(np.array_equal(read[0][name], read[1][name]) for name in read[0])
    for ours, theirs in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("mlp.gate", "ffn_gate_inp")):
        for layer in range(4):
            name = f"model.layers.{layer}.{ours}.weight"
            assert np.array_equal(read[1][f"blk.{layer}.{theirs}.weight"], kept.norms()[name].numpy())
            assert not np.array_equal(kept.norms()[name].numpy(), uneven.arrays[name])


@pytest.mark.slow
def test_tiny_moe_loses_less_than_by_rounding() -> None:
    checkpoint = open_checkpoint("tiny-moe")
    plan = resolve(find_target("onnx").recipe("int4"), checkpoint.config)
    sample = bundled_sample(open_tokenizer(checkpoint), checkpoint.config, "calibration", tokens=4096, window=256)
    statistics = collect(checkpoint, sample)
    folded = awq_model(checkpoint, plan, statistics)
    found = CheckpointWeights(folded, plan, "mse", mean_square_of(moments_of(folded, statistics)))
    evaluator = KLEvaluator(checkpoint, held_out_sample(checkpoint))
    losses = [evaluator.divergence(Dequantized(weights)) for weights in (found, CheckpointWeights(checkpoint, plan, "rtn"))]
    assert losses[0] < losses[1]
