"""Residual rescaling: the whole residual stream times a power of two, exact and free at run time.

A residual stream may grow into the hundreds of thousands, beyond fp16's 65504. RMSNorm undoes any scale of its input, so scaling
what is added to the stream (embeddings, every `attention.out` and `ffn.down`, the sum of experts) by `alpha`, and each norm's eps by `alpha²`, leaves the
logits as they were while the stream shrinks by `alpha`. The head, tied or not, keeps its scale.
"""

from __future__ import annotations

import math
from dataclasses import replace

from elmexport.errors import ElmExportError
from elmexport.graph.ir import Graph, Node
from elmexport.weights import Role


def rescale(graph: Graph, alpha: float) -> Graph:
    """Multiply the residual stream of `graph` by `alpha`.

    Raises:
        ElmExportError: `alpha` is not a power of two.
    """
    if alpha <= 0 or math.frexp(alpha)[0] != 0.5:
        raise ElmExportError(f"alpha is {alpha!r}; the residual stream is scaled by a power of two, so that nothing is rounded")
    return graph.with_nodes(tuple(_rescale_node(node, alpha) for node in graph.nodes))


def _rescale_node(node: Node, alpha: float) -> Node:
    if node.role is not None and node.role.writes_to_stream:
        return replace(node, weight_scale=node.weight_scale * alpha)
    # The q/k norms, inside `attention` or before it, see projections, whose scale has not changed.
    if node.op == "rms_norm" and node.weights["weight"].role not in (Role.NORM_QUERY, Role.NORM_KEY):
        return replace(node, attrs=node.attrs | {"eps": node.attrs["eps"] * alpha**2})
    return node
