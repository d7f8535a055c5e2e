"""Parts of a graph, run one after another, are the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from elmexport.graph.forward import KVCaches, forward
from elmexport.graph.ir import IDS, Graph
from elmexport.graph.partition import partition
from elmexport.graph.rescale import rescale
from elmexport.models import trace
from elmexport.models.openelm.config import OpenELMConfig
from tests.graph.test_forward import OPTIONS, Forward, token_ids
from tests.memory_checkpoint import random_checkpoint

CUTS = [(0, *cut) for count in range(5) for cut in combinations(range(1, 5), count)]  # of the model's five layers


@pytest.fixture(scope="module")
def graph(deep_config: OpenELMConfig) -> Graph:
    return rescale(trace(deep_config), 2.0**-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parts_in_a_row_are_the_model(deep_config: OpenELMConfig, options: dict[str, Any]) -> None:
    checkpoint = random_checkpoint(replace(deep_config, **options))
    graph = rescale(trace(checkpoint.config), 2.0**-5)
    ids = token_ids(12, checkpoint.config)
    whole = Forward(checkpoint, graph)
    for starts in ((0, 1), (0, 2, 3), (0, 1, 2, 3, 4)):
        caches = KVCaches(graph, dtype=torch.float64)
        for first, last in ((0, 9), (9, 12)):
            x = torch.from_numpy(ids[None, first:last])
            for part in partition(graph, starts):
                x = forward(part, lambda spec: whole.weights[spec.name], x, first, caches)
            assert np.array_equal(x[0].numpy(), whole(ids[first:last], first)), starts


@pytest.mark.parametrize("starts", CUTS)
def test_everything_is_in_one_part(graph: Graph, starts: Sequence[int]) -> None:
    parts = partition(graph, starts)
    assert tuple(node for part in parts for node in part.nodes) == graph.nodes
    assert [next(iter(part.kv_heads)) for part in parts] == list(starts)
    assert {layer: heads for part in parts for layer, heads in part.kv_heads.items()} == graph.kv_heads
    for which in ("present_keys", "present_values"):
        assert tuple(name for part in parts for name in getattr(part, which)) == getattr(graph, which)
        assert all(len(getattr(part, which)) == len(part.kv_heads) for part in parts)
    assert [part.is_first for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]


@pytest.mark.parametrize("starts", CUTS)
def test_one_value_goes_from_part_to_part(graph: Graph, starts: Sequence[int]) -> None:
    parts = partition(graph, starts)
    assert (parts[0].source, parts[-1].result) == (IDS, graph.result)
    outside = {"position", *(f"{kind}_cache.{i}" for kind in "kv" for i in range(5))}
    for part, following in pairwise(parts):
        assert following.source == part.result
        assert graph.values[part.result].shape == ("batch", "tokens", graph.dims.model_dim)
    for part in parts:
        made = {name for node in part.nodes for name in node.outputs}
        assert {name for node in part.nodes for name in node.inputs.values()} - made - outside == {part.source}


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 3, 2), (0, 5)])
def test_parts_without_layers_are_a_mistake(graph: Graph, starts: Sequence[int]) -> None:
    with pytest.raises(AssertionError, match="cannot begin"):
        partition(graph, starts)
