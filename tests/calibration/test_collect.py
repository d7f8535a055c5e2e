"""Collected statistics against an independent float64 forward pass, and against a whole-model pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from calibration import second_moments
from calibration.collect import collect
from calibration.residual import ResidualPeak
from calibration.statistics import Statistics
from calibration.text import Sample
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.graph import forward as forward_module
from elmexport.graph.forward import KVCaches, forward
from elmexport.models import trace
from elmexport.models.openelm.config import OpenELMConfig
from tests.calibration.moments_reference import watch
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint

OPTIONS: dict[str, dict[str, Any]] = {
    "as-published": {},
    "no-qk-norm": {"normalize_qk_projections": False},
    "untied": {"share_input_output_layers": False},
    "no-glu": {"ffn_with_glu": False},
}


def sample_of(config: OpenELMConfig, windows: int = 5, window: int = 24) -> Sample:
    return Sample(np.random.default_rng(1).integers(0, config.vocab_size, (windows, window)), "random ids")


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """Several batches, the last one smaller, and Hessians of several blocks, the last one smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_module, "BATCH_TOKENS", 48)
        patch.setattr(second_moments, "BLOCK", 80)
        yield


@pytest.fixture(scope="module")
def statistics(small_checkpoint: MemoryCheckpoint) -> Statistics:
    return collect(small_checkpoint, sample_of(small_checkpoint.config), hessian=True)


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, id=name, marks=() if name == "as-published" else pytest.mark.slow) for name, options in OPTIONS.items()],
)
def test_equals_numpy(small_config: OpenELMConfig, options: dict[str, Any]) -> None:
    checkpoint = random_checkpoint(replace(small_config, **options))
    sample = sample_of(checkpoint.config)
    found = collect(checkpoint, sample, hessian=True)
    seen = watch(checkpoint.config, checkpoint.arrays, list(sample.ids))

    assert set(found.facts.inputs) == set(seen.inputs)
    for name, x in seen.inputs.items():
        moments = found.moments(checkpoint.specs[name])
        assert moments is not None and moments.tokens == len(x) == 5 * 24
        assert moments.mean_abs is not None and moments.hessian is not None
        assert {t.dtype for t in (moments.mean_square, moments.mean_abs, moments.hessian)} == {torch.float32}
        np.testing.assert_allclose(moments.mean_square, np.mean(x**2, axis=0), rtol=2e-5)
        np.testing.assert_allclose(moments.mean_abs, np.mean(np.abs(x), axis=0), rtol=2e-5)
        expected = x.T @ x / len(x)
        scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        assert np.abs((moments.hessian.numpy() - expected) / scale).max() < 2e-5, name
    np.testing.assert_allclose(found.facts.residual_peaks, seen.stream, rtol=1e-5)
    assert found.residual_peak == pytest.approx(max(seen.stream), rel=1e-5)
    assert set(found.facts.norm_peaks) == set(seen.norms) == {s.name for s in checkpoint.config.weights() if s.role.is_norm}
    for name, peak in seen.norms.items():
        assert found.facts.norm_peaks[name] == pytest.approx(peak, rel=2e-5), name
    assert found.token_counts is not None
    np.testing.assert_array_equal(found.token_counts, np.bincount(sample.ids.ravel(), minlength=checkpoint.config.vocab_size))


def test_hessians_are_symmetric_and_positive(small_checkpoint: MemoryCheckpoint, statistics: Statistics) -> None:
    for name in statistics.facts.inputs:
        moments = statistics.moments(small_checkpoint.specs[name])
        assert moments is not None and moments.hessian is not None
        assert torch.equal(moments.hessian, moments.hessian.T)
        assert torch.equal(moments.hessian.diagonal(), moments.mean_square)
        eigenvalues = torch.linalg.eigvalsh(moments.hessian.double())
        assert eigenvalues[0] > -1e-6 * eigenvalues[-1]  # fewer rows than columns: singular, up to rounding


def test_weights_that_multiply_nothing_have_no_moments(small_config: OpenELMConfig, statistics: Statistics) -> None:
    norms = [spec for spec in small_config.weights() if spec.role.is_norm]
    assert norms and all(statistics.moments(spec) is None for spec in norms)
    untied = random_checkpoint(replace(small_config, share_input_output_layers=False))
    found = collect(untied, sample_of(untied.config, windows=1))
    assert found.moments(untied.specs["transformer.token_embeddings.weight"]) is None
    assert found.moments(untied.specs["lm_head.weight"]) is not None


@pytest.mark.slow
def test_layer_by_layer_equals_the_whole_model(tiny: Checkpoint) -> None:
    """The trained model: each linear's input as an observer of one pass over the whole graph sees it."""
    sample = sample_of(tiny.config, windows=3, window=32)
    graph = trace(tiny.config, 32)
    read = {node.inputs["x"] for node in graph.nodes if node.op == "linear"}
    seen: dict[str, torch.Tensor] = {}
    peak = ResidualPeak()

    def observe(node: Any, out: torch.Tensor) -> None:
        peak(node, out)
        if node.outputs[0] in read:
            seen[node.outputs[0]] = out.double().flatten(0, 1)

    caches = KVCaches(graph, batch=3, context=32)
    forward(graph, lambda spec: tiny.tensor(spec.name).float(), torch.from_numpy(sample.ids), 0, caches, observe=observe)
    found = collect(tiny, sample)
    assert len(seen) == 4 * tiny.config.num_transformer_layers + 1
    for name, x in seen.items():
        torch.testing.assert_close(found.tensors[f"{name}.mean_square"].double(), x.square().mean(0), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.tensors[f"{name}.mean_abs"].double(), x.abs().mean(0), rtol=1e-4, atol=0)
    assert found.residual_peak == pytest.approx(peak.value, rel=1e-5)


def test_without_hessians(small_checkpoint: MemoryCheckpoint, statistics: Statistics) -> None:
    found = collect(small_checkpoint, sample_of(small_checkpoint.config))
    assert not any(name.endswith("hessian") for name in found.tensors)
    for name in found.tensors:
        assert torch.equal(found.tensors[name], statistics.tensors[name])


def test_only_one_layers_weights_are_read_at_a_time(small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is read once, in forward order, whatever the number of batches."""
    asked = []

    def tensor(name: str) -> torch.Tensor:
        asked.append(name)
        return small_checkpoint.read(name)

    monkeypatch.setattr(small_checkpoint, "tensor", tensor)
    collect(small_checkpoint, sample_of(small_checkpoint.config))
    assert asked == [spec.name for spec in small_checkpoint.config.weights()]


def test_progress_adds_up(small_checkpoint: MemoryCheckpoint) -> None:
    class Count:
        total = done = 0

        def stage(self, name: str, total: int | None = None) -> None:
            assert total
            self.total += total

        def advance(self, n: int) -> None:
            self.done += n

    count = Count()
    collect(small_checkpoint, sample_of(small_checkpoint.config), hessian=True, progress=count)
    assert count.done == count.total > 0


def test_activations_that_overflow(small_config: OpenELMConfig) -> None:
    checkpoint = random_checkpoint(small_config)
    checkpoint.arrays["transformer.layers.2.ffn.proj_1.weight"] *= np.float32(1e30)
    with pytest.raises(ElmExportError, match="not finite in float32"):
        collect(checkpoint, sample_of(small_config))


def test_windows_that_do_not_fit(small_checkpoint: MemoryCheckpoint) -> None:
    with pytest.raises(ElmExportError, match="this model takes 1 to 256"):
        collect(small_checkpoint, sample_of(small_checkpoint.config, windows=1, window=257))
    with pytest.raises(ElmExportError, match="token id 512 is outside the vocabulary"):
        collect(small_checkpoint, Sample(np.full((1, 4), 512), "too large"))
