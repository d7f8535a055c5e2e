"""Names of inputs, outputs and metadata of our ONNX models: those that optimum, onnxruntime-genai and transformers.js ask for.

`attention_mask` int64 `[batch, total]` has ones over the tokens in the cache and those now fed. Past and present of layer N are
`past_key_values.N.key|value` and `present.N.key|value`, `[batch, KV heads of the layer, length, head_dim]`.
"""

from __future__ import annotations

from typing import Literal

INPUT_IDS, ATTENTION_MASK, LOGITS = "input_ids", "attention_mask", "logits"
LOGITS_TO_KEEP = "logits_to_keep"  # an optional input: the last tokens of each row whose logits are wanted
EVERY_TOKEN = 0  # its value for all of them
CONTEXT_METADATA = "elmexport.context"  # the tokens that the model's rotary tables reach

KeyOrValue = Literal["key", "value"]
_PAST, _PRESENT = "past_key_values.", "present."


def past(layer: int | str, which: KeyOrValue) -> str:
    """The input that holds a layer's cache; `layer` may be a placeholder ("%d")."""
    return f"{_PAST}{layer}.{which}"


def present(layer: int | str, which: KeyOrValue) -> str:
    """The output that holds a layer's cache with the new tokens."""
    return f"{_PRESENT}{layer}.{which}"


def is_past(name: str) -> bool:
    """Whether an input is a layer's cache."""
    return name.startswith(_PAST)


def present_of(past_name: str) -> str:
    """The output that follows the cache input `past_name`."""
    return _PRESENT + past_name.removeprefix(_PAST)
