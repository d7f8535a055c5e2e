"""An independent float64 forward pass of OpenELM in plain numpy: what every runtime's logits are held against.

Written from the facts of Apple's published modelling code, one sequence, no KV cache, no batching, no speed. It takes its per-layer head
counts from the shapes of the tensors, and imports nothing of `elmexport`, nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rounded = Callable[[Array], Array]

EPS = 1e-6  # OpenELMRMSNorm's default, which no configuration field overrides


class Config(Protocol):
    """The fields of `config.json` that the forward pass needs beyond the shapes of the tensors."""

    @property
    def num_transformer_layers(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_gqa_groups(self) -> int: ...
    @property
    def rope_freq_constant(self) -> float: ...
    @property
    def ffn_with_glu(self) -> bool: ...


def reference_logits(
    config: Config,
    tensors: Mapping[str, NDArray[np.floating]],
    ids: Sequence[int] | NDArray[np.integer],
    rounded: Rounded = np.asarray,
) -> Array:
    """float64 logits `[tokens, vocab]` of `ids` from position 0. `tensors` has Apple's names; an absent `lm_head.weight` means tied.

    `rounded` is what an engine does to the input of each product with a weight, if it does not take it as it is.
    """
    weights = {name: np.asarray(tensor, dtype=np.float64) for name, tensor in tensors.items()}
    table = weights["transformer.token_embeddings.weight"]
    x = table[np.asarray(ids)]
    for i in range(config.num_transformer_layers):
        layer = {
            name.removeprefix(f"transformer.layers.{i}."): w for name, w in weights.items() if name.startswith(f"transformer.layers.{i}.")
        }
        x = x + _attention(config, layer, _rms_norm(x, layer["attn_norm.weight"]), rounded)
        x = x + _feed_forward(config, layer, _rms_norm(x, layer["ffn_norm.weight"]), rounded)
    x = _rms_norm(x, weights["transformer.norm.weight"])
    return rounded(x) @ weights.get("lm_head.weight", table).T


def q8_0(x: Array) -> Array:
    """Rows `[tokens, width]` as ggml's Q8_0 has them: blocks of 32, the largest magnitude at 127, scales in fp16."""
    blocks = x.astype(np.float32).reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (codes * scale.astype(np.float16)).astype(np.float64).reshape(x.shape)


def log_probs(logits: NDArray[np.floating]) -> Array:
    """Log-softmax over the last axis in float64."""
    wide = np.asarray(logits, dtype=np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def kl(p_logits: NDArray[np.floating], q_logits: NDArray[np.floating]) -> Array:
    """KL(p || q) in nats of each row of logits `[tokens, vocab]`: `[tokens]`."""
    p, q = log_probs(p_logits), log_probs(q_logits)
    return np.sum(np.exp(p) * (p - q), axis=-1)


def _rms_norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS) * weight


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _rope(x: Array, theta: float) -> Array:
    """Rotates the pairs (i, i + d/2) of `x` `[heads, tokens, d]` by the angle `token * theta^(-2i/d)`."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] / theta ** (np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate((turned.real, turned.imag), axis=-1)


def _attention(config: Config, layer: Mapping[str, Array], x: Array, rounded: Rounded = np.asarray) -> Array:
    tokens, d, group = len(x), config.head_dim, config.num_gqa_groups
    queries = layer["attn.out_proj.weight"].shape[1] // d
    heads = (rounded(x) @ layer["attn.qkv_proj.weight"].T).reshape(tokens, -1, d).swapaxes(0, 1)  # [queries + 2 * keys, tokens, d]
    keys = (len(heads) - queries) // 2
    assert queries == keys * group, "the shapes of qkv_proj and out_proj contradict num_gqa_groups"
    q, k, v = heads[:queries], heads[queries : queries + keys], heads[queries + keys :]
    if "attn.q_norm.weight" in layer:
        q, k = _rms_norm(q, layer["attn.q_norm.weight"]), _rms_norm(k, layer["attn.k_norm.weight"])
    q, k = _rope(q, config.rope_freq_constant), _rope(k, config.rope_freq_constant)
    out = np.empty((tokens, queries, d))
    for head in range(queries):
        for t in range(tokens):
            score = k[head // group, : t + 1] @ q[head, t] / np.sqrt(d)
            share = np.exp(score - score.max())
            out[t, head] = share @ v[head // group, : t + 1] / share.sum()
    return rounded(out.reshape(tokens, -1)) @ layer["attn.out_proj.weight"].T


def _feed_forward(config: Config, layer: Mapping[str, Array], x: Array, rounded: Rounded = np.asarray) -> Array:
    hidden = rounded(x) @ layer["ffn.proj_1.weight"].T
    if config.ffn_with_glu:
        gate, up = np.split(hidden, 2, axis=-1)
        hidden = _silu(gate) * up
    else:
        hidden = _silu(hidden)
    return rounded(hidden) @ layer["ffn.proj_2.weight"].T
