"""Quantization along the forward pass: targets against float64 least squares, and the order of the methods on held-out prose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from calibration import sequential
from calibration.calibrate import make_sample
from calibration.held_out import PARTS
from calibration.sensitivity import KLEvaluator
from calibration.sequential import quantize_in_order
from calibration.text import Sample, bundled_text, sample_windows
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.models import trace
from elmexport.progress import SilentProgress
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan, Recipe, Rule, resolve
from elmexport.quantization.schemes import CodedScheme, Float, find_scheme
from elmexport.target import find_target
from elmexport.weights import Role
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint


def plan_of(checkpoint: Checkpoint, *rules: Rule) -> Plan:
    recipe = Recipe("test", "", Float("fp32"), Float("fp32"), Float("fp16"), Float("fp16"), 1.0, rules)
    return resolve(recipe, checkpoint.config)


def test_the_target_is_a_least_squares_solution(deep_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the layer should give, and what the stream lacks, from what the quantized layers hand on; its ridge is the best held out."""
    monkeypatch.setattr(sequential, "product_dtype", lambda device: torch.float32)
    generator = torch.Generator().manual_seed(0)
    node = next(node for node in trace(deep_checkpoint.config).nodes if node.role is Role.FFN_DOWN)
    weight = torch.randn(6, 10, generator=generator)
    before, lack = torch.randn(4, 32, 10, generator=generator), 0.1 * torch.randn(4, 32, 6, generator=generator)
    now = 0.9 * before + 0.1 * torch.randn(4, 32, 10, generator=generator)
    name = node.inputs["x"]
    found = sequential._target(node, weight, {name: before}, {name: now}, lambda rows: lack[rows])
    x = now.reshape(-1, 10).double().numpy()
    y = (before.reshape(-1, 10) @ weight.T + lack.reshape(-1, 6)).double().numpy()
    old = weight.double().numpy()
    np.testing.assert_allclose(found.hessian.numpy(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)

    def ridge(rows: slice, part: float) -> np.ndarray:
        """Ridge regression towards the weight as it was."""
        h = x[rows].T @ x[rows] / len(x[rows])
        ridge = part * np.trace(h) / 10 * np.eye(10)
        return np.linalg.solve(h + ridge, (x[rows].T @ y[rows] / len(x[rows])) + ridge @ old.T).T

    def held_out(part: float) -> float:
        halves = slice(0, 64), slice(64, 128)
        return sum(np.square(y[other] - x[other] @ ridge(seen, part).T).sum() for seen, other in (halves, halves[::-1]))

    best = min(PARTS, key=held_out)
    assert best not in (PARTS[0], PARTS[-1])
    np.testing.assert_allclose(found.weight.numpy(), ridge(slice(None), best), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_the_plan_once_and_better_than_each_alone(deep_checkpoint: MemoryCheckpoint, tied: bool) -> None:
    checkpoint = deep_checkpoint if tied else random_checkpoint(replace(deep_checkpoint.config, share_input_output_layers=False))
    plan = plan_of(checkpoint, Rule(find_scheme("lut4-group8"), frozenset({Role.FFN_DOWN})), Rule(find_scheme("int8-block32")))
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (9, 64))
    found = {spec.name: q for spec, q in quantize_in_order(checkpoint, plan, Sample(ids, "random"), SilentProgress())}
    assert list(found) == [name for name, scheme in plan.schemes.items() if isinstance(scheme, CodedScheme)]
    assert all(quantized.scheme == plan.schemes[name] for name, quantized in found.items())
    evaluator = KLEvaluator(checkpoint, Sample(ids, "random"))
    alone = {name: quantize(checkpoint.tensor(name), plan.schemes[name]).dequantize() for name in found}  # type: ignore[call-overload]
    assert evaluator.divergence({name: quantized.dequantize() for name, quantized in found.items()}) < 0.4 * evaluator.divergence(alone)


@pytest.mark.slow
def test_codes_do_not_depend_on_the_number_of_threads(deep_checkpoint: MemoryCheckpoint) -> None:
    plan = plan_of(deep_checkpoint, Rule(find_scheme("lut4-group8"), frozenset({Role.FFN_DOWN})), Rule(find_scheme("int4-block32")))
    ids = np.random.default_rng(0).integers(0, deep_checkpoint.config.vocab_size, (9, 64))
    before = torch.get_num_threads()
    try:
        parts = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            parts.append([q.parts() for _, q in quantize_in_order(deep_checkpoint, plan, Sample(ids, "random"), SilentProgress())])
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*parts, strict=True):
        assert all(torch.equal(one[name], several[name]) for name in one)


def test_with_exact_predecessors_and_room_nothing_is_corrected(deep_checkpoint: MemoryCheckpoint) -> None:
    """Where only the last matrix is quantized, both copies agree up to it: the target is the weight."""
    last = "transformer.layers.4.ffn.proj_2.weight"
    float_plan = plan_of(deep_checkpoint, Rule(Float("fp32")))
    plan = Plan(float_plan.recipe, {**float_plan.schemes, last: find_scheme("int8-block32")}, (), 32)
    ids = np.random.default_rng(0).integers(0, deep_checkpoint.config.vocab_size, (2, 64))
    ((spec, quantized),) = quantize_in_order(deep_checkpoint, plan, Sample(ids, "random"), SilentProgress())
    assert spec.name == last
    nearest = quantize(deep_checkpoint.tensor(last), find_scheme("int8-block32"))  # type: ignore[call-overload]
    tensor = deep_checkpoint.tensor(last)
    assert float((quantized.dequantize() - tensor).norm()) < 2 * float((nearest.dequantize() - tensor).norm())


@pytest.mark.slow
def test_gptq_below_mse_below_rtn_on_text_that_was_not_used(tiny: Checkpoint) -> None:
    """In divergence on the bundled prose, which neither `tiny` nor the calibration has read; the margins catch a method that degrades."""
    assert tiny.tokenizer_path is not None
    prose = sample_windows(load_tokenizer(tiny.tokenizer_path), [bundled_text("weighting")], "prose", tokens=1280, window=256)
    evaluator = KLEvaluator(tiny, prose)
    plan = resolve(find_target("gguf").recipe("int4"), tiny.config)
    schemes = {name: scheme for name, scheme in plan.schemes.items() if isinstance(scheme, CodedScheme)}

    def cost(method: str) -> float:
        return evaluator.divergence({n: quantize(tiny.tensor(n), s, method).dequantize() for n, s in schemes.items()})  # type: ignore[call-overload]

    sample = make_sample(tiny, tokens=4096)
    in_order = {spec.name: q.dequantize() for spec, q in quantize_in_order(tiny, plan, sample, SilentProgress())}
    assert not set(map(tuple, prose.ids[:, 1:].tolist())) & set(map(tuple, sample.ids[:, 1:].tolist()))
    gptq, mse, rtn = evaluator.divergence(in_order), cost("mse"), cost("rtn")
    assert gptq < 0.5 * min(mse, rtn)
    assert mse < 1.1 * rtn
