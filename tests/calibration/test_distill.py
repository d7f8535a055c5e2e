"""Distillation: gradients against finite differences of a float64 reference, and what it gains on text that it has not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration import distill as distillation
from calibration.calibrate import make_sample
from calibration.calibrated import distilled_weights, gptq_weights
from calibration.dequantized import Dequantized
from calibration.distill import HELD_OUT, distill, split
from calibration.options import WeightOptions
from calibration.sensitivity import KLEvaluator
from calibration.text import Sample, bundled_text, sample_windows
from calibration.weight_set import StoredWeights
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.errors import ElmExportError
from elmexport.progress import SilentProgress
from elmexport.quantization.codec import Quantized
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan, Recipe, Rule, resolve
from elmexport.quantization.schemes import CodedScheme, Float, find_scheme
from elmexport.quantization.weight_source import CheckpointWeights
from elmexport.weights import Role
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import log_probs, reference_logits


def plan_of(checkpoint: Checkpoint, scheme: str) -> Plan:
    rules = (Rule(find_scheme("int8-block32"), frozenset({Role.EMBEDDING, Role.LM_HEAD})), Rule(find_scheme(scheme)))
    return resolve(Recipe("test", "", Float("fp32"), Float("fp32"), Float("fp16"), Float("fp32"), 1.0, rules), checkpoint.config)


@pytest.mark.parametrize("name", ["int4-block32", "int4-asym-block32", "int3-block64", "lut4-group8", "lut6-tensor"])
def test_parameter_gradients_are_autograds(name: str) -> None:
    scheme = find_scheme(name)
    assert isinstance(scheme, CodedScheme)
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 64))).float()
    tensor = quantize(weight, scheme)
    assert tensor.parameters is not None
    gradient = torch.from_numpy(np.random.default_rng(1).normal(size=(16, 64)))
    leaf = tensor.parameters.double().requires_grad_()
    if "lut" in name:
        values = leaf.gather(1, tensor.codes.view(len(leaf), -1).long()).view(16, 64)  # type: ignore[attr-defined]
    else:
        zeros = 0 if tensor.zeros is None else tensor.zeros[..., None]  # type: ignore[attr-defined]
        values = ((tensor.codes.view(*leaf.shape, -1) - zeros) * leaf[..., None]).view(16, 64)
    torch.testing.assert_close(values.float(), tensor.dequantize())
    values.backward(gradient)
    assert leaf.grad is not None
    torch.testing.assert_close(tensor.parameter_gradient(gradient.float()), leaf.grad.float(), rtol=1e-4, atol=1e-5)
    moved = tensor.with_parameters(tensor.parameters.float() * 1.01)
    assert torch.equal(moved.codes, tensor.codes)
    torch.testing.assert_close(moved.dequantize(), tensor.dequantize() * 1.01, rtol=2e-3, atol=1e-5)


def test_mxfp4_has_nothing_to_train() -> None:
    scheme = find_scheme("mxfp4")
    assert isinstance(scheme, CodedScheme)
    assert quantize(torch.randn(4, 32), scheme).parameters is None


def test_entries_that_would_pass_each_other_stay_in_order() -> None:
    scheme = find_scheme("lut4-tensor")
    assert isinstance(scheme, CodedScheme)
    tensor = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), scheme)
    assert tensor.parameters is not None
    parameters = tensor.parameters.clone()
    parameters[0, 3] = parameters[0, 6]
    tables = tensor.with_parameters(parameters).parameters
    assert tables is not None and bool((tables.diff() >= 0).all())


@pytest.mark.parametrize("scheme", ["int4-block32", "lut4-group8"])
def test_gradients_are_the_slopes_of_a_float64_reference(
    small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Along a random direction of every kind of parameter: KL of numpy's logits a little ahead less a little behind."""
    monkeypatch.setattr(distillation, "product_dtype", lambda device: torch.float32)
    ids = np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, (2, 12))
    weights = CheckpointWeights(small_checkpoint, plan_of(small_checkpoint, scheme))
    student = distillation._Student(small_checkpoint, weights)
    with torch.no_grad():
        text = distillation._Text(student, Sample(ids, "random"))
    gradients = student.gradients(text, torch.arange(2))
    stored = {name: weights.get(spec) for name, spec in small_checkpoint.specs.items()}

    def divergence(changes: dict[str, np.ndarray]) -> float:
        arrays = {}
        for name, weight in stored.items():
            value = weight.dequantize() if isinstance(weight, Quantized) else weight
            arrays[name] = value.double().numpy() + changes.get(name, 0.0)
        total = 0.0
        for row in ids:
            p = log_probs(reference_logits(small_checkpoint.config, small_checkpoint.arrays, row))
            q = log_probs(reference_logits(small_checkpoint.config, arrays, row))
            total += float((np.exp(p) * (p - q)).sum())
        return total / ids.size

    assert gradients.keys() == {name for name, spec in small_checkpoint.specs.items() if spec.role is not Role.EMBEDDING}
    for role in (Role.ATTENTION_QKV, Role.ATTENTION_OUT, Role.FFN_GATE_UP, Role.FFN_DOWN, Role.NORM_FFN, Role.NORM_FINAL):
        name = next(name for name, spec in small_checkpoint.specs.items() if spec.role is role)
        gradient, weight = gradients[name], stored[name]
        direction = gradient / gradient.norm()
        step = 1e-4
        if isinstance(weight, Quantized):  # values are linear in the parameters: their change is that of ones among the parameters
            assert weight.parameters is not None
            ones = torch.autograd.functional.jvp(lambda p, w=weight: _values(w, p), weight.parameters.float(), direction)[1]
            change = ones.double().numpy()
        else:
            change = direction.double().numpy()
        slope = (divergence({name: step * change}) - divergence({name: -step * change})) / (2 * step)
        assert slope == pytest.approx(float(gradient.norm()), rel=2e-2), role


def _values(weight: Quantized, parameters: torch.Tensor) -> torch.Tensor:
    if parameters.shape[0] == weight.codes.shape[0]:
        return (weight.codes.view(*parameters.shape, -1) * parameters[..., None]).view(weight.codes.shape)
    return parameters.gather(1, weight.codes.view(len(parameters), -1).long()).view(weight.codes.shape)


def test_windows_that_judge_are_not_trained_on() -> None:
    ids = np.arange(20 * 4).reshape(20, 4)
    train, held = split(Sample(ids, "text"))
    assert len(held.ids) == len(ids) // HELD_OUT
    assert sorted([*train.ids[:, 0], *held.ids[:, 0]]) == list(ids[:, 0])


@pytest.fixture(scope="module")
def prose(tiny: Checkpoint) -> KLEvaluator:
    """On the bundled prose, which neither `tiny` nor the calibration has read."""
    assert tiny.tokenizer_path is not None
    return KLEvaluator(
        tiny, sample_windows(load_tokenizer(tiny.tokenizer_path), [bundled_text("weighting")], "prose", tokens=2048, window=256)
    )


@pytest.mark.slow
def test_coarse_weights_lose_much_less_on_a_text_of_their_own(
    tiny: Checkpoint, prose: KLEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "RATE", 4e-3)
    monkeypatch.setattr(distillation, "EPOCHS", 6)
    weights = CheckpointWeights(tiny, plan_of(tiny, "int4-block128"))
    found = distill(tiny, weights, *split(make_sample(tiny, tokens=4096)), SilentProgress())
    assert found.after < 0.8 * found.before
    start = Dequantized(weights)
    trained = {**start, **{name: tensor.dequantize() for name, tensor in found.tensors.items()}, **found.norms}
    assert prose.divergence(trained) < 0.85 * prose.divergence(start)


@pytest.mark.slow
def test_weights_are_computed_once(tiny: Checkpoint, prose: KLEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By GPTQ, then distilled, each from the windows that do not judge; a second time they come out of the cache."""
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path))
    plan, sample = plan_of(tiny, "int4-block32"), make_sample(tiny, tokens=4096)
    weights = distilled_weights(tiny, plan, sample, SilentProgress())
    facts = weights.facts.distilled
    assert facts is not None and facts["after"] <= facts["before"]
    start = gptq_weights(tiny, plan, split(sample)[0], SilentProgress())
    assert len(list((tmp_path / "weights").iterdir())) == 2
    before, after = (prose.divergence(Dequantized(StoredWeights(tiny, plan, found))) for found in (start, weights))
    assert after < 1.01 * before
    monkeypatch.setattr("calibration.calibrated.distill", lambda *_: pytest.fail("computed again"))
    again = distilled_weights(tiny, plan, sample, SilentProgress())
    assert again.path == weights.path
    assert again.facts.folded == tuple(name for name, spec in tiny.specs.items() if spec.role.is_norm)


def test_a_text_of_few_windows_is_refused(small_checkpoint: MemoryCheckpoint) -> None:
    ids = np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, (4, 32))
    with pytest.raises(ElmExportError, match="gives 4 windows of 32 tokens; distillation needs at least 8"):
        distilled_weights(small_checkpoint, plan_of(small_checkpoint, "int4-block32"), Sample(ids, "random"), SilentProgress())


def test_training_that_gains_nothing_leaves_the_start(small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps so large that every state is worse, the first one is what counts."""
    monkeypatch.setattr(distillation, "RATE", 30.0)
    ids = np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, (9, 32))
    train, held = split(Sample(ids, "random"))
    weights = CheckpointWeights(small_checkpoint, plan_of(small_checkpoint, "int4-block32"))
    found = distill(small_checkpoint, weights, train, held, SilentProgress())
    assert found.before == found.after
    for name, tensor in found.tensors.items():
        start = weights.get(small_checkpoint.specs[name])
        assert isinstance(start, Quantized) and torch.equal(tensor.dequantize(), start.dequantize())


def test_statistics_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match="--method distill runs the model on a text; give a text file to --calibrate"):
        WeightOptions(method="distill", calibrate=tmp_path / "statistics.safetensors")
