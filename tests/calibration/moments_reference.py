"""The inputs of every linear layer, in float64 numpy: `tests.reference`'s forward pass, watched.

Its own functions are called, so that a value here is what its logits are made of; nothing of `elmexport` is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests import reference
from tests.reference import Array, Config


@dataclass
class Seen:
    """Rows of every linear layer's input by the weight's name, and what was on the residual stream by layer (0: the embedding)."""

    inputs: dict[str, Array] = field(default_factory=dict)
    stream: list[float] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)  # largest sum of squares


def watch(config: Config, tensors: Mapping[str, NDArray[np.floating]], windows: Sequence[NDArray[np.integer]]) -> Seen:
    """Run every window by itself and put the rows together."""
    weights = {name: np.asarray(tensor, dtype=np.float64) for name, tensor in tensors.items()}
    parts = [_watch(config, weights, ids) for ids in windows]
    return Seen(
        {name: np.concatenate([part.inputs[name] for part in parts]) for name in parts[0].inputs},
        np.max([part.stream for part in parts], axis=0).tolist(),
        {name: max(part.norms[name] for part in parts) for name in parts[0].norms},
    )


def _watch(config: Config, weights: Mapping[str, Array], ids: NDArray[np.integer]) -> Seen:
    seen = Seen()

    def norm(x: Array, name: str) -> Array:
        seen.norms[name] = float(np.sum(x**2, axis=-1).max())
        return reference._rms_norm(x, weights[name])

    x = weights["transformer.token_embeddings.weight"][ids]
    seen.stream.append(np.abs(x).max())
    for i in range(config.num_transformer_layers):
        prefix = f"transformer.layers.{i}."
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        read = norm(x, f"{prefix}attn_norm.weight")
        seen.inputs[f"{prefix}attn.qkv_proj.weight"] = read
        # With the identity as its output projection, the attention gives what the real projection reads.
        width = layer["attn.out_proj.weight"].shape[1]
        attended = reference._attention(config, layer | {"attn.out_proj.weight": np.eye(width)}, read)
        seen.inputs[f"{prefix}attn.out_proj.weight"] = attended
        _head_norms(config, layer, read, prefix, seen)
        first = attended @ layer["attn.out_proj.weight"].T
        middle = x + first
        read = norm(middle, f"{prefix}ffn_norm.weight")
        seen.inputs[f"{prefix}ffn.proj_1.weight"] = read
        hidden = reference._feed_forward(config, layer | {"ffn.proj_2.weight": np.eye(layer["ffn.proj_2.weight"].shape[1])}, read)
        seen.inputs[f"{prefix}ffn.proj_2.weight"] = hidden
        second = hidden @ layer["ffn.proj_2.weight"].T
        x = middle + second
        seen.stream.append(max(np.abs(part).max() for part in (first, middle, second, x)))
    head = "lm_head.weight" if "lm_head.weight" in weights else "transformer.token_embeddings.weight"
    seen.inputs[head] = norm(x, "transformer.norm.weight")
    return seen


def _head_norms(config: Config, layer: Mapping[str, Array], read: Array, prefix: str, seen: Seen) -> None:
    if "attn.q_norm.weight" not in layer:
        return
    heads = (read @ layer["attn.qkv_proj.weight"].T).reshape(len(read), -1, config.head_dim)
    queries = layer["attn.out_proj.weight"].shape[1] // config.head_dim
    keys = queries // config.num_gqa_groups
    squares = np.sum(heads**2, axis=-1)
    seen.norms[f"{prefix}attn.q_norm.weight"] = float(squares[:, :queries].max())
    seen.norms[f"{prefix}attn.k_norm.weight"] = float(squares[:, queries : queries + keys].max())
