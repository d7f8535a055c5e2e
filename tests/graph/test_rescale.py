"""Residual rescaling leaves the logits alone, shrinks the stream, and takes powers of two only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from elmexport.errors import ElmExportError
from elmexport.graph.ir import Node
from elmexport.graph.rescale import rescale
from elmexport.models import trace
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.weights import Role
from tests.graph.test_forward import Forward, token_ids
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.reference import reference_logits


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [2.0**-14, 0.5, 1.0, 8.0])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_stay_bit_for_bit(small_config: OpenELMConfig, alpha: float, tied: bool) -> None:
    checkpoint = random_checkpoint(replace(small_config, share_input_output_layers=tied))
    graph = trace(checkpoint.config)
    ids = token_ids(20, checkpoint.config)
    plain = Forward(checkpoint, graph)(ids, 0)
    scaled = Forward(checkpoint, rescale(graph, alpha))(ids, 0)
    assert np.array_equal(plain, scaled)
    assert np.abs(scaled - reference_logits(checkpoint.config, checkpoint.arrays, ids)).max() < 1e-9


@pytest.mark.slow
def test_the_whole_stream_is_scaled_and_nothing_else(small_checkpoint: MemoryCheckpoint) -> None:
    graph = trace(small_checkpoint.config)
    outputs: list[dict[str, torch.Tensor]] = []
    for variant in (graph, rescale(graph, 2.0**-6)):
        seen: dict[str, torch.Tensor] = {}

        def observe(node: Node, out: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> None:
            seen[node.name] = out

        Forward(small_checkpoint, variant)(token_ids(9, small_checkpoint.config), 0, observe=observe)
        outputs.append(seen)
    plain, scaled = outputs
    for node in graph.nodes:
        in_stream = node.op == "add" or node.role in (Role.EMBEDDING, Role.ATTENTION_OUT, Role.FFN_DOWN)
        assert torch.equal(scaled[node.name], plain[node.name] * (2.0**-6 if in_stream else 1)), node.name


def test_scaling_twice_multiplies(small_config: OpenELMConfig) -> None:
    graph = trace(small_config)
    assert rescale(rescale(graph, 0.25), 0.5).nodes == rescale(graph, 0.125).nodes
    assert rescale(graph, 1.0).nodes == graph.nodes


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.3, 3.0, 0.0, -0.5])
def test_only_powers_of_two(small_config: OpenELMConfig, alpha: float) -> None:
    with pytest.raises(ElmExportError, match="power of two"):
        rescale(trace(small_config), alpha)
