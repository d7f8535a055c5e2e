"""The model, in float64, against the independent numpy forward pass; and the KV cache against the full forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from elmexport.graph import forward as forward_module
from elmexport.graph.forward import GetRows, KVCaches, forward
from elmexport.graph.ir import Graph, Node
from elmexport.models import trace
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.models.openelm.module import OpenELM
from elmexport.weights import Role
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.reference import reference_logits

TOLERANCE = 1e-9  # largest |difference| of logits of order 10 in float64

OPTIONS: dict[str, dict[str, Any]] = {
    "as-published": {},
    "no-qk-norm": {"normalize_qk_projections": False},
    "untied": {"share_input_output_layers": False},
    "no-glu": {"ffn_with_glu": False},
    "all-heads-alike": {"qkv_multipliers": 1.0, "ffn_multipliers": 2.0},
    "no-gqa": {"num_gqa_groups": 1},
    "interpolated": {"qkv_multipliers": (0.5, 1.0), "ffn_multipliers": (0.5, 4.0)},
    "rope-base": {"rope_freq_constant": 500},
}


def token_ids(count: int, config: OpenELMConfig, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, count)


class Forward:
    """A traced graph with its weights in float64 and a cache, fed piece by piece."""

    def __init__(self, checkpoint: MemoryCheckpoint, graph: Graph | None = None) -> None:
        self.graph = graph or trace(checkpoint.config)
        self.weights = {name: torch.from_numpy(array).double() for name, array in checkpoint.arrays.items()}
        self.caches = KVCaches(self.graph, dtype=torch.float64)

    def __call__(self, ids: Sequence[int] | NDArray[np.int64], position: int, **options: Any) -> NDArray[np.float64]:
        tokens = torch.tensor(np.asarray(ids))[None]
        return forward(self.graph, lambda spec: self.weights[spec.name], tokens, position, self.caches, **options)[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_model_and_trace_equal_numpy(small_config: OpenELMConfig, options: dict[str, Any]) -> None:
    checkpoint = random_checkpoint(replace(small_config, **options))
    checkpoint.check()
    ids = token_ids(24, small_config)
    expected = reference_logits(checkpoint.config, checkpoint.arrays, ids)

    passes = Forward(checkpoint)
    assert np.abs(passes(ids, 0) - expected).max() < TOLERANCE

    model = OpenELM(checkpoint.config).double()
    model.load_state_dict(passes.weights)
    caches = KVCaches(passes.graph, dtype=torch.float64)
    logits, keys, values = model(torch.from_numpy(ids)[None], torch.tensor(0), caches.keys, caches.values)
    assert np.abs(logits[0].numpy() - expected).max() < TOLERANCE
    for returned, interpreted in zip(keys + values, passes.caches.keys + passes.caches.values, strict=True):
        torch.testing.assert_close(returned, interpreted, atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def expected(small_checkpoint: MemoryCheckpoint) -> NDArray[np.float64]:
    """Logits of 128 tokens: the whole cache."""
    return reference_logits(small_checkpoint.config, small_checkpoint.arrays, token_ids(128, small_checkpoint.config))


@pytest.fixture(scope="module")
def graph(small_config: OpenELMConfig) -> Graph:
    return trace(small_config)


@pytest.mark.slow
@given(splits=st.lists(st.integers(1, 127), max_size=4, unique=True).map(sorted))
@settings(max_examples=15, deadline=None)
def test_any_split_of_the_sequence_gives_the_full_forward(
    small_checkpoint: MemoryCheckpoint, graph: Graph, expected: NDArray[np.float64], splits: list[int]
) -> None:
    ids = token_ids(128, small_checkpoint.config)
    passes = Forward(small_checkpoint, graph)
    edges = [0, *splits, 128]
    parts = [passes(ids[start:end], start) for start, end in itertools.pairwise(edges)]
    assert np.abs(np.concatenate(parts) - expected).max() < TOLERANCE


@pytest.mark.parametrize("prefill", [1, 64, 120])
def test_prefill_then_token_by_token(small_checkpoint: MemoryCheckpoint, graph: Graph, expected: NDArray[np.float64], prefill: int) -> None:
    ids = token_ids(128, small_checkpoint.config)
    passes = Forward(small_checkpoint, graph)
    parts = [passes(ids[:prefill], 0), *(passes(ids[i : i + 1], i) for i in range(prefill, min(128, prefill + 10)))]
    found = np.concatenate(parts)
    assert np.abs(found - expected[: len(found)]).max() < TOLERANCE


def test_going_back_overwrites_the_cache(small_checkpoint: MemoryCheckpoint, graph: Graph, expected: NDArray[np.float64]) -> None:
    ids = token_ids(128, small_checkpoint.config)
    passes = Forward(small_checkpoint, graph)
    passes(ids[:40], 0)
    passes(ids[::-1][:60].copy(), 40)  # another continuation, to be forgotten
    assert np.abs(passes(ids[40:80], 40) - expected[40:80]).max() < TOLERANCE


def test_sequences_of_a_batch_do_not_mix(small_checkpoint: MemoryCheckpoint, graph: Graph) -> None:
    config = small_checkpoint.config
    ids = np.stack([token_ids(12, config, seed) for seed in range(3)])
    passes = Forward(small_checkpoint, graph)
    caches = KVCaches(graph, batch=3, dtype=torch.float64)
    found = forward(graph, lambda spec: passes.weights[spec.name], torch.from_numpy(ids), 0, caches).numpy()
    for sequence, logits in zip(ids, found, strict=True):
        assert np.abs(logits - reference_logits(config, small_checkpoint.arrays, sequence)).max() < TOLERANCE


def test_head_of_the_last_tokens_only(small_checkpoint: MemoryCheckpoint, graph: Graph, expected: NDArray[np.float64]) -> None:
    ids = token_ids(128, small_checkpoint.config)
    for last in (1, 7, 50):
        found = Forward(small_checkpoint, graph)(ids[:50], 0, last=last)
        assert found.shape == (last, small_checkpoint.config.vocab_size)
        assert np.abs(found - expected[50 - last : 50]).max() < TOLERANCE


def test_observer_sees_every_node_and_weights_are_asked_for_in_order(small_checkpoint: MemoryCheckpoint, graph: Graph) -> None:
    passes = Forward(small_checkpoint, graph)
    seen: list[Node] = []
    asked: list[str] = []

    def weight(spec: Any) -> torch.Tensor:
        asked.append(spec.name)
        return passes.weights[spec.name]

    def observe(node: Node, out: torch.Tensor) -> None:
        seen.append(node)
        assert out.shape[:2] == (1, 3)

    forward(graph, weight, torch.tensor([[5, 6, 7]]), 0, passes.caches, observe=observe)
    assert seen == list(graph.nodes)
    names = [spec.name for spec in small_checkpoint.config.weights()]
    assert asked == [*names, names[0]]  # the tied table comes again as the head
    assert seen[-1].role is Role.LM_HEAD


@pytest.mark.parametrize("options", [{}, OPTIONS["untied"]], ids=["tied", "untied"])
def test_large_matrices_are_widened_a_slice_at_a_time(
    small_config: OpenELMConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in fp16, whole or as rows that are made when they are read, give what they give once they are float32."""
    checkpoint = random_checkpoint(replace(small_config, **options))
    graph, ids = trace(checkpoint.config), torch.from_numpy(token_ids(12, small_config))[None]
    weights = {name: torch.from_numpy(array).half() for name, array in checkpoint.arrays.items()}

    def logits(weight: GetRows) -> torch.Tensor:
        return forward(graph, weight, ids, 0, KVCaches(graph))

    expected = logits(lambda spec: weights[spec.name].float())
    monkeypatch.setattr(forward_module, "_WIDENED", 1000)  # smaller than any matrix, and no whole number of rows
    for weight in (
        lambda spec: weights[spec.name],
        lambda spec: MadeRows(weights[spec.name]) if len(spec.shape) == 2 else weights[spec.name],
    ):
        torch.testing.assert_close(logits(weight), expected, rtol=1e-5, atol=1e-5)


class MadeRows:
    """Rows of a tensor, never more than 1000 values of a slice."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        found = self.tensor[rows]
        assert isinstance(rows, torch.Tensor) or found.numel() <= 1000
        return found
