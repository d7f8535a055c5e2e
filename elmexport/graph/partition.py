"""Partition of a graph at layer boundaries: consecutive graphs, between which the residual stream alone travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from elmexport.graph.ir import Graph, Node


def partition(graph: Graph, starts: Sequence[int]) -> tuple[Graph, ...]:
    """Cut `graph` into consecutive parts that begin with the layers `starts`, the first of which is 0.

    The embedding is in the first part, the final norm and the head in the last, the KV cache of a layer where the layer is. `source` of each
    part is `result` of the one before; node, value and weight names stay as they are.
    """
    bounds = [*starts, len(graph.kv_heads)]
    assert bounds[0] == 0 and all(start < stop for start, stop in pairwise(bounds)), f"parts cannot begin with the layers {list(starts)}"
    parts: list[Graph] = []
    for start, stop in pairwise(bounds):
        nodes = tuple(node for node in graph.nodes if start <= _layer(node, bounds[-1]) < stop)
        parts.append(
            replace(
                graph,
                nodes=nodes,
                source=parts[-1].result if parts else graph.source,
                result=nodes[-1].outputs[0],
                present_keys=graph.present_keys[start:stop],
                present_values=graph.present_values[start:stop],
            )
        )
    return tuple(parts)


def _layer(node: Node, layers: int) -> int:
    """The layer that the node goes with: the first for the embedding, the last for the final norm and the head."""
    if node.layer is not None:
        return node.layer
    return 0 if node.op == "embed" else layers - 1
