"""The interface of the Core ML packages that we export for GPUs: swift-transformers' for models with a stateful KV cache.

One function; inputs `inputIds` int32 `[1, T]` and `causalMask` fp16 `[1, 1, 1 or T, end]`, both of flexible size; states `keyCache` and
`valueCache` fp16 `[1, KV heads of all layers, context, head_dim]`; output `logits` fp16 `[1, T, vocab]`. The mask's width `end` says how many
tokens the cache holds afterwards, so the first of the T tokens stands at `end - T`. The mask may be all zeros: the model is causal by itself.
"""

from __future__ import annotations

FUNCTION = "main"
INPUT_IDS, CAUSAL_MASK, LOGITS = "inputIds", "causalMask", "logits"
KEY_CACHE, VALUE_CACHE = "keyCache", "valueCache"
HUB_NAME_METADATA = "co.huggingface.exporters.name"  # by which swift-transformers finds a model's files on the hub
