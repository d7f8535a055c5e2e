"""The torch device: which one is chosen, and that a pass keeps to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.awq import awq_model
from calibration.calibrated import gptq_weights
from calibration.collect import collect
from calibration.folding import FoldedCheckpoint
from calibration.sensitivity import KLEvaluator
from calibration.table import head_moments
from calibration.text import Sample
from elmexport.errors import ElmExportError
from elmexport.evaluation.self_check import reference_pass
from elmexport.graph.device import VARIABLE, torch_device
from elmexport.graph.forward import KVCaches, forward, linear_stages
from elmexport.graph.ir import Node
from elmexport.models import trace
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.progress import SilentProgress
from elmexport.quantization.recipes import Recipe, Rule, resolve
from elmexport.quantization.schemes import Float, find_scheme
from elmexport.runtimes.torch import TorchRuntime
from elmexport.weights import Role
from tests.fake_device import DEVICE, FakeDevice
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint

USERS = (
    "calibration.awq",
    "calibration.calibrated",
    "calibration.collect",
    "calibration.sensitivity",
    "calibration.sequential",
    "calibration.table",
    "elmexport.evaluation.self_check",
    "elmexport.runtimes.torch",
)


@pytest.mark.parametrize(
    ("asked", "cuda", "mps", "expected"),
    [
        ("", False, False, "cpu"),
        ("auto", False, False, "cpu"),
        ("auto", True, False, "cuda"),
        ("auto", False, True, "mps"),
        ("cpu", True, True, "cpu"),
        ("cuda", True, False, "cuda"),
        ("mps", False, True, "mps"),
    ],
)
def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch, asked: str, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setenv(VARIABLE, asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert torch_device() == torch.device(expected)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("tpu", r"ELMEXPORT_TORCH_DEVICE is 'tpu'; choose auto, cpu, cuda, mps"),
        ("cuda", r"ELMEXPORT_TORCH_DEVICE is 'cuda', and torch .* finds no such device here; choose cpu"),
    ],
)
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, asked: str, message: str) -> None:
    monkeypatch.setenv(VARIABLE, asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ElmExportError, match=message):
        torch_device()


@pytest.fixture
def ids(small_checkpoint: MemoryCheckpoint) -> np.ndarray:
    return np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, (3, 16))


@torch.no_grad()
def test_a_pass_computes_where_its_caches_are(small_checkpoint: MemoryCheckpoint, ids: np.ndarray) -> None:
    graph = trace(small_checkpoint.config, 16)
    seen: list[torch.device] = []

    def observe(node: Node, out: torch.Tensor) -> None:
        seen.append(out.device)

    def logits(device: torch.device) -> torch.Tensor:
        caches = KVCaches(graph, batch=3, device=device)
        return forward(graph, lambda spec: small_checkpoint.tensor(spec.name), torch.from_numpy(ids), 0, caches, observe=observe)

    expected = logits(torch.device("cpu"))
    assert set(seen) == {torch.device("cpu")}
    seen.clear()
    with FakeDevice():
        found = logits(DEVICE)
    assert set(seen) == {DEVICE} and found.device == torch.device("cpu")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_stages_take_from_the_cpu_and_give_to_it(small_checkpoint: MemoryCheckpoint, ids: np.ndarray) -> None:
    graph = trace(small_checkpoint.config, 16)
    values = {graph.source: torch.from_numpy(ids)}
    with FakeDevice():
        for stage in linear_stages(graph):
            loaded = stage.load(lambda spec: small_checkpoint.tensor(spec.name), DEVICE)
            assert all(weight.device == DEVICE for weight in loaded.weights.values())
            values |= loaded.run(values)
    assert {value.device for value in values.values()} == {torch.device("cpu")}
    expected = forward(graph, lambda spec: small_checkpoint.tensor(spec.name), torch.from_numpy(ids), 0, KVCaches(graph, batch=3))
    torch.testing.assert_close(values[graph.result], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_everything_that_runs_the_model(small_checkpoint: MemoryCheckpoint, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the CPU's is mixed in, and the figures are those of the CPU."""

    def figures() -> list[np.ndarray]:
        sample = Sample(ids, "random ids")
        statistics = collect(small_checkpoint, sample, hessian=True)
        runtime = TorchRuntime(small_checkpoint, context=32)
        found = [tensor.numpy() for tensor in statistics.tensors.values()]
        found += [runtime.logits(ids[0]), runtime.logits(ids[0][:1], 16), *runtime.continuations([ids[1], ids[2][:3]], 16)]
        reference = reference_pass(small_checkpoint, trace(small_checkpoint.config), None, SilentProgress())
        found += [reference.logits, *(square.numpy() for square in reference.statistics.tensors.values())]
        found.append(np.array(KLEvaluator(small_checkpoint, sample).divergence({})))
        return [*found, head_moments(small_checkpoint, sample, SilentProgress()).cpu().numpy()]

    expected = figures()
    for user in USERS:
        monkeypatch.setattr(f"{user}.torch_device", lambda: DEVICE)
    with FakeDevice():
        found = figures()
    for here, there in zip(expected, found, strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_every_calibrated_method(small_config: OpenELMConfig, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Codes are found on the device: from statistics, along the text, and for folded weights."""
    checkpoint = random_checkpoint(replace(small_config, num_transformer_layers=2, qkv_multipliers=0.5, ffn_multipliers=0.5))
    sample = Sample(ids, "random ids")
    for user in ("calibration.gptq", "calibration.sequential"):  # in one dtype: a CPU may multiply bfloat16, the fake device does not
        monkeypatch.setattr(f"{user}.product_dtype", lambda device: torch.float32)
    statistics = collect(checkpoint, sample, hessian=True)
    kinds = {Role.EMBEDDING: "int4-block32", Role.ATTENTION_QKV: "int4-asym-block32", Role.ATTENTION_OUT: "lut4-group8"}
    rules = (*(Rule(find_scheme(name), frozenset({role})) for role, name in kinds.items()), Rule(Float("fp32")))
    plan = resolve(Recipe("test", "", Float("fp32"), Float("fp32"), Float("fp16"), Float("fp32"), 1.0, rules), checkpoint.config)

    def fold() -> FoldedCheckpoint:
        return awq_model(checkpoint, plan, statistics)

    def codes(place: str) -> list[list[np.ndarray]]:
        monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / place))
        found = [
            gptq_weights(checkpoint, plan, statistics, SilentProgress()),
            gptq_weights(checkpoint, plan, sample, SilentProgress()),
            gptq_weights(checkpoint, plan, sample, SilentProgress(), fold, method="awq+gptq"),
        ]
        return [[weights.get(checkpoint.specs[name]).codes.numpy() for name in weights.facts.schemes] for weights in found]

    expected = codes("here")
    for user in USERS:
        monkeypatch.setattr(f"{user}.torch_device", lambda: DEVICE)
    # The fake device is one thread's.
    monkeypatch.setattr("elmexport.quantization.integer_codec.in_threads", lambda work, starts: [work(start) for start in starts])
    with FakeDevice():
        found = codes("there")
    assert all(len(codes) == 1 + 2 * 2 for codes in found)
    for here, there in zip(expected[0], found[0], strict=True):
        assert (here != there).mean() < 1e-3
    for here, there in zip(expected[1] + expected[2], found[1] + found[2], strict=True):
        # A little off in the attention, which has another kernel there; 48 tokens leave much to chance.
        assert np.abs(here.astype(int) - there).mean() < 0.5
