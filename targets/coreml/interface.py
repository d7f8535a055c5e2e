"""The package as its users see it: shapes and descriptions of functions, inputs, states and outputs. No coremltools.

Their names are those that the runtime asks for.
"""

from __future__ import annotations

from elmexport.graph.ir import Graph
from elmexport.runtimes.coreml import DECODE, INPUT_IDS, KEY_CACHE, LOGITS, POSITION, PREFILL, VALUE_CACHE

PREFILL_TOKENS = 64
MAX_DIM = 16384  # the Neural Engine takes no larger dimension
CONTEXT_MULTIPLE = 32  # states with other dimensions were reported to fail on the Neural Engine (coremltools issue 2631)

DESCRIPTIONS = {
    INPUT_IDS: "Token ids, BOS first. A prompt shorter than the function's tokens is padded with any id: what padding writes lies behind the last token, and is overwritten before it is seen",
    POSITION: "Place in the cache of the first token, 0 for a new text; position plus the function's tokens must not exceed the context",
    LOGITS: "Scores of the next token, for every token given",
    KEY_CACHE: "Keys of all layers, rotated: [1, KV heads of all layers, context, head_dim]",
    VALUE_CACHE: "Values of all layers: [1, KV heads of all layers, context, head_dim]",
}


def functions(graph: Graph) -> dict[str, int]:
    """The package's functions, and how many tokens each takes."""
    return {PREFILL: min(PREFILL_TOKENS, graph.context), DECODE: 1}


def cache_shape(graph: Graph) -> tuple[int, int, int, int]:
    """`[1, KV heads of all layers, context, head_dim]`.

    Layers have different numbers of KV heads, and states of different shapes do not compile on every chip: all lie on one axis.
    """
    return 1, sum(layer.kv_heads for layer in graph.config.layers), graph.context, graph.config.head_dim
