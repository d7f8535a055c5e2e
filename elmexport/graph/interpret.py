"""Runs a `Graph` with the ops' eager implementations, fetching each weight when its node runs.

With resident weights this is the torch runtime; with weights streamed from a checkpoint it is a reference pass in the memory of one
layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elmexport.graph import ops
from elmexport.graph.ir import Graph, Node
from elmexport.weights import Role, WeightSpec

WeightSource = Callable[[WeightSpec], Tensor]
Observer = Callable[[Node, Tensor], None]


class Caches:
    """Static key and value caches of every layer, `[batch, K_n, context, d]`, zero at first; as long as the graph's where None."""

    def __init__(self, graph: Graph, batch: int = 1, dtype: torch.dtype = torch.float32, context: int | None = None) -> None:
        context = graph.context if context is None else context
        shapes = [(batch, layer.kv_heads, context, graph.dims.head_dim) for layer in graph.dims.layers]
        self.keys = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype) for shape in shapes]

    def copy_prefix(self, source: Caches, tokens: int) -> None:
        """Take over the first `tokens` tokens of `source`, whose batch is one, in every sequence."""
        for own, other in zip([*self.keys, *self.values], [*source.keys, *source.values], strict=True):
            own[:, :, :tokens] = other[:, :, :tokens]


def interpret(
    graph: Graph,
    weight: WeightSource,
    ids: Tensor,
    position: int,
    caches: Caches,
    *,
    last: int | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Logits `[batch, tokens, vocab]` of `ids` `[batch, tokens]` standing at `position`; writes into `caches`.

    `weight` gives a tensor in the dtype of the caches. `last` computes the head for the last tokens only (`[batch, last, vocab]`).
    `observe` is called with every node and its first output.
    """
    return run_nodes(
        graph.nodes,
        {"ids": ids},
        weight,
        lambda layer: (caches.keys[layer], caches.values[layer]),
        position,
        result=graph.result,
        last=last,
        observe=observe,
    )


def run_nodes(
    nodes: Sequence[Node],
    values: dict[str, Tensor],
    weight: WeightSource,
    caches: Callable[[int], tuple[Tensor, Tensor]],
    position: int,
    *,
    result: str,
    last: int | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Run `nodes` on `values`, their inputs by name, and return the value called `result`; see `interpret`.

    `caches` gives the key and value cache of a layer. Every value is dropped from `values` after its last use.
    """
    remaining = Counter(name for node in nodes for name in node.inputs.values())
    for node in nodes:
        x = {argument: values[name] for argument, name in node.inputs.items() if name in values}
        if last is not None and node.role is Role.LM_HEAD:
            x["x"] = x["x"][:, -last:]
        w = {argument: weight(spec) for argument, spec in node.weights.items()}
        if node.op == "attention":
            assert node.layer is not None
            k_cache, v_cache = caches(node.layer)
            out = ops.attention_(x["qkv"], w.get("q_norm"), w.get("k_norm"), k_cache, v_cache, position, **node.attrs)
        else:
            out = getattr(torch.ops.elmexport, node.op)(**x, **w, **node.attrs)
            if node.weight_scale != 1.0:
                out = out * node.weight_scale
        if observe is not None:
            observe(node, out)
        values[node.outputs[0]] = out
        for name in node.inputs.values():
            remaining[name] -= 1
            if not remaining[name]:
                values.pop(name, None)
    return values[result]
