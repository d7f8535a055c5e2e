"""Sizes that every package keeps, and those of the Neural Engine. No coremltools."""

from __future__ import annotations

from elmexport.graph.ir import Graph

PREFILL_TOKENS = 64
PREFILL_MULTIPLE = 32  # the Neural Engine keeps the last axis in units of 64 bytes, 32 fp16 values
MAX_DIM = 16384  # the Neural Engine takes no larger dimension
CONTEXT_MULTIPLE = 32  # states with other dimensions were reported to fail on the Neural Engine (coremltools issue 2631)


def cache_shape(graph: Graph) -> tuple[int, int, int, int]:
    """Shape of a cache, `[1, KV heads of the graph's layers, context, head_dim]`.

    Layers have different numbers of KV heads, and states of different shapes do not compile on every chip: all lie on one axis.
    """
    return 1, sum(graph.kv_heads.values()), graph.context, graph.dims.head_dim


def query_groups(graph: Graph) -> list[int]:
    """The numbers of query heads that read one KV head, each once; layers may differ."""
    counts = (node.attrs["query_heads"] // node.attrs["kv_heads"] for node in graph.attentions)
    return list(dict.fromkeys(counts))
