"""A forward pass one layer at a time over many sequences: how to work through a text in the memory of one layer.

`interpret` runs every layer for one batch; here every batch runs through one layer before the next layer's weights are read. Between two
stages lives the residual stream alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elmexport.graph.interpret import Observer, run_nodes
from elmexport.graph.ir import Graph, Node
from elmexport.weights import Role, WeightSpec


@dataclass(frozen=True)
class Stage:
    """Consecutive nodes of `graph` that take one value and give one: `source` and `result` are the names of the two."""

    name: str  # "embedding", "layer 3", "norm"
    graph: Graph
    nodes: tuple[Node, ...]
    source: str
    result: str

    def weights(self) -> list[WeightSpec]:
        """Every weight of the stage, in the order of use."""
        return [spec for node in self.nodes for spec in node.weights.values()]

    def run(self, weights: Mapping[str, Tensor], x: Tensor, *, observe: Observer | None = None) -> Tensor:
        """What the stage makes of sequences that start at position 0: `x` is `[batch, tokens, dim]`, or ids `[batch, tokens]` at first.

        `weights` holds the tensors of `weights()` by name, in the dtype to compute in. `observe` is called with every node and its first
        output.
        """
        dims = self.graph.dims

        def caches(layer: int) -> tuple[Tensor, Tensor]:
            shape = (x.shape[0], dims.layers[layer].kv_heads, x.shape[1], dims.head_dim)
            return torch.empty(shape, dtype=x.dtype), torch.empty(shape, dtype=x.dtype)

        return run_nodes(self.nodes, {self.source: x}, lambda spec: weights[spec.name], caches, 0, result=self.result, observe=observe)


def stages(graph: Graph) -> list[Stage]:
    """The embedding, every layer, and the final norm. The head, which would follow, is in none: its input is what the last one gives."""
    groups: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.role is not Role.LM_HEAD:
            outside = "embedding" if node.op == "embed" else "norm"
            groups.setdefault(outside if node.layer is None else f"layer {node.layer}", []).append(node)
    found: list[Stage] = []
    for name, nodes in groups.items():
        found.append(Stage(name, graph, tuple(nodes), found[-1].result if found else "ids", nodes[-1].outputs[0]))
    return found
