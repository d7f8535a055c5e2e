"""Op vocabulary: everything that a forward pass is made of, as `torch.library` custom ops.

Each op has an eager implementation, which is the numerical reference (it computes in the dtype of its inputs), and a fake one, by which a
model is traced without weights (`elmexport.graph.trace`; `torch.export` takes it too). A target is a table of lowerings from these ops.

Shapes: `batch` B, `tokens` T, model dimension D, context C (length of the static cache), query heads H, KV heads K, head dimension d,
experts E, width of an expert F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "elmexport"

EAGER: dict[str, Callable[..., Tensor]] = {}
"""Eager implementations by the name of the op, but of `attention` (`attention_`) and `moe` (`moe_`); autograd sees through them, as it does not through custom ops."""

FAKE: dict[str, Callable[..., Any]] = {}
"""Fake implementations by the name of the op: outputs of the right shape and dtype, on the meta device where the inputs are.

They use `new_empty` alone: on that device `empty_like` loads sympy, most of a second.
"""


def _op(function: Callable[..., Tensor]) -> Any:
    """Register `function` as the custom op of its name; returns torch's `CustomOpDef`."""
    EAGER[function.__name__] = function
    return torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", mutates_args=())(function)


def _fake(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the fake implementation of `op`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FAKE[op._opoverload._schema.name.split("::")[1]] = function
        op.register_fake(function)
        return function

    return register


@_op
def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Look up rows of `table` `[vocab, D]` at `ids` `[B, T]` (int64): `[B, T, D]`."""
    return torch.nn.functional.embedding(ids, table)


@_fake(embed)
def _(ids: Tensor, table: Tensor) -> Tensor:
    return table.new_empty((*ids.shape, table.shape[1]))


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@_op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: `x / sqrt(mean(x², last axis) + eps) * weight`; `x` `[..., D]`, `weight` `[D]`."""
    return _normalize(x, weight, eps)


@_fake(rms_norm)
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_op
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Linear layer: `x @ weightᵀ`; `x` `[..., in]`, `weight` `[out, in]`: `[..., out]`. Every projection, the LM head included."""
    return torch.nn.functional.linear(x, weight)


@_fake(linear)
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_op
def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU: `silu(gate) * up`, the gate being the first half of the last axis: `[..., 2F]` to `[..., F]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@_fake(swiglu)
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_op
def silu(x: Tensor) -> Tensor:
    """SiLU: `x * sigmoid(x)`, the activation of a feed-forward network without a gate (`ffn_with_glu` false)."""
    return torch.nn.functional.silu(x)


@_fake(silu)
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_op
def add(x: Tensor, y: Tensor) -> Tensor:
    """Residual sum of two tensors of one shape."""
    return x + y


@_fake(add)
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_op
def join_qkv(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Concatenate separate projections along the last axis, `[B, T, H d]`, `[B, T, K d]` twice, into what `attention` takes."""
    return torch.cat((query, key, value), dim=-1)


@_fake(join_qkv)
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], query.shape[-1] + key.shape[-1] + value.shape[-1]))


Expert = Callable[[int], tuple[Tensor, Tensor, Tensor]]
"""Gives gate `[F, D]`, up `[F, D]` and down `[D, F]` of an expert."""


def route(logits: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Choose `active` experts for each row of `logits` `[rows, E]`: their weights and numbers, both `[rows, active]`.

    The weights are the softmax over all experts (in float32 at least), not renormalized over those chosen.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights, chosen = logits.softmax(-1, dtype=dtype).topk(active, dim=-1)
    return weights.to(logits.dtype), chosen


def moe_(x: Tensor, logits: Tensor, expert: Expert, active: int, observe: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
    """Compute `moe`, asking for an expert's weights when it has tokens.

    `observe` is called with an expert's number and what its matrices read: `[routed, D]`, and `[routed, F]` of the down projection.
    """
    rows = x.flatten(0, -2)
    weights, chosen = route(logits.flatten(0, -2), active)
    out = torch.zeros_like(rows)
    for number in range(logits.shape[-1]):
        tokens, place = (chosen == number).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        gate, up, down = expert(number)
        routed = rows[tokens]
        hidden = torch.nn.functional.silu(torch.nn.functional.linear(routed, gate)) * torch.nn.functional.linear(routed, up)
        if observe is not None:
            observe(number, routed, hidden)
        out.index_add_(0, tokens, torch.nn.functional.linear(hidden, down) * weights[tokens, place, None])
    return out.view_as(x)


@torch.library.custom_op(f"{NAMESPACE}::moe", mutates_args=())
def moe(x: Tensor, logits: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor], active: int) -> Tensor:
    """Mixture of experts: each token `x` `[B, T, D]` goes to the `active` experts of largest `logits` `[B, T, E]`.

    An expert is a SwiGLU network, `down(silu(gate x) * up x)` with `gate` and `up` `[F, D]`, `down` `[D, F]`, one of each for every expert.
    The result `[B, T, D]` is their sum, weighted by the softmax of all logits, without renormalization (arXiv:2409.02060).
    """
    return moe_(x, logits, lambda number: (gate[number], up[number], down[number]), active)


@_fake(moe)
def _(x: Tensor, logits: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor], active: int) -> Tensor:
    return x.new_empty(x.shape)


def rope_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the cosine and sine `[T, d]` of rotary embeddings at `positions` `[T]`, both halves of the last axis alike (rotate-half).

    `angle(p, i) = p * theta ** (-2i / d)`, computed in float64 and rounded once to `dtype`.
    """
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim)
    angles = torch.outer(positions.to(torch.float64), inverse).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to `x` `[..., T, d]` by `cos` and `sin` `[T, d]`: dimension i pairs with i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention_(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int,
    query_heads: int,
    kv_heads: int,
    rope_theta: float,
    eps: float,
) -> Tensor:
    """Compute `attention`, writing the new keys and values into the caches it was given; returns the output only."""
    batch, tokens, _ = qkv.shape
    head_dim = k_cache.shape[3]
    heads = qkv.view(batch, tokens, -1, head_dim).transpose(1, 2)
    query, key, value = torch.split(heads, [query_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        query = _normalize(query, q_norm, eps)
    if k_norm is not None:
        key = _normalize(key, k_norm, eps)
    end = position + tokens
    # On the CPU, whatever the device: some have no float64, and the angles are the same everywhere.
    cos, sin = (angles.to(qkv.device) for angles in rope_angles(torch.arange(position, end), head_dim, rope_theta, qkv.dtype))
    query, key = rotate_half(query, cos, sin), rotate_half(key, cos, sin)
    k_cache[:, :, position:end] = key
    v_cache[:, :, position:end] = value
    # Row i of the mask is token position + i: it sees the cache up to and including itself.
    mask = torch.ones(tokens, end, dtype=torch.bool, device=qkv.device).tril(diagonal=position)
    out = torch.nn.functional.scaled_dot_product_attention(query, k_cache[:, :, :end], v_cache[:, :, :end], attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch, tokens, query_heads * head_dim)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    query_heads: int,
    kv_heads: int,
    rope_theta: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query causal attention over a static KV cache.

    Splits `qkv` `[B, T, (H + 2K) d]` into heads (queries, keys, values), applies the per-head q/k RMSNorm where a weight `[d]` is
    given, rotates queries and keys (rotate-half RoPE of base `rope_theta`), writes keys and values into the caches `[B, K, C, d]` at
    `position` (scalar int64), and lets each token attend to the cache up to itself, scaled by `d ** -0.5`. Query head h reads KV head
    `h // (H / K)`.

    Returns the output `[B, T, H d]` and the two updated caches.
    """
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    out = attention_(qkv, q_norm, k_norm, k_cache, v_cache, int(position), query_heads, kv_heads, rope_theta, eps)
    return out, k_cache, v_cache


@_fake(attention)
def _(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    query_heads: int,
    kv_heads: int,
    rope_theta: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out = qkv.new_empty((*qkv.shape[:-1], query_heads * k_cache.shape[3]))
    return out, k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)
