"""Runs a `Graph` with the ops' eager implementations, fetching each weight when its node runs.

With resident weights this is the torch runtime; with weights streamed from a checkpoint it is a reference pass in the memory of one
layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

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
        shapes = [(batch, layer.kv_heads, context, graph.config.head_dim) for layer in graph.config.layers]
        self.keys = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype) for shape in shapes]


def interpret(
    graph: Graph,
    weight: WeightSource,
    ids: Tensor,
    position: int,
    caches: Caches,
    *,
    last_only: bool = False,
    observe: Observer | None = None,
) -> Tensor:
    """Logits `[batch, tokens, vocab]` of `ids` `[batch, tokens]` standing at `position`; writes into `caches`.

    `weight` gives a tensor in the dtype of the caches. `last_only` computes the head for the last token only (`[batch, 1, vocab]`).
    `observe` is called with every node and its first output.
    """
    remaining = Counter(name for node in graph.nodes for name in node.inputs.values())
    values: dict[str, Tensor] = {"ids": ids}
    for node in graph.nodes:
        x = {argument: values[name] for argument, name in node.inputs.items() if name in values}
        if last_only and node.role is Role.LM_HEAD:
            x["x"] = x["x"][:, -1:]
        w = {argument: weight(spec) for argument, spec in node.weights.items()}
        if node.op == "attention":
            assert node.layer is not None
            k_cache, v_cache = caches.keys[node.layer], caches.values[node.layer]
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
    return values[graph.logits]
