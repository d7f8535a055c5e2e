"""Ranges and descriptions of inputs, states and output, as the package itself gives them. No coremltools."""

from __future__ import annotations

from elmexport.contracts.coreml_gpu import CAUSAL_MASK, INPUT_IDS, KEY_CACHE, LOGITS, VALUE_CACHE
from elmexport.graph.ir import Graph
from elmexport.models import find_model

DESCRIPTIONS = {
    INPUT_IDS: "Token ids [1, T], BOS first; T is any number from 1 to the context",
    CAUSAL_MASK: (
        "Added to the attention scores, [1, 1, 1 or T, end]: end is the number of tokens in the cache after this call, so that the first of "
        "the T tokens stands at end - T. Zeros are enough: a token never sees those behind it. One column too many from the first call on is "
        "allowed (swift-transformers counts so): the first place of the cache is then never written, and hidden"
    ),
    LOGITS: "Scores of the next token, for every token given: [1, T, vocabulary]",
    KEY_CACHE: "Keys of all layers, rotated: [1, KV heads of all layers, context, head_dim]",
    VALUE_CACHE: "Values of all layers: [1, KV heads of all layers, context, head_dim]",
}


def input_ranges(graph: Graph) -> dict[str, tuple[tuple[int, int], ...]]:
    """Ranges of the inputs: the least and largest size of each axis."""
    one, any_number = (1, 1), (1, graph.context)
    return {INPUT_IDS: (one, any_number), CAUSAL_MASK: (one, one, any_number, any_number)}


def hub_name(name: str) -> str:
    """Hub repository of the model called `name` (its display name); an unknown model is its own name."""
    known = find_model(name)
    return name if known is None or known.hub_id is None else known.hub_id
