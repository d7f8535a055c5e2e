"""OLMoE in the op vocabulary: a decoder whose feed-forward networks are mixtures of experts.

Queries and keys pass a norm over their full width before they are cut into heads. Parameter names are those of the published files, one tensor for each projection of each expert, so a state dict loads as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elmexport.graph import ops
from elmexport.models.olmoe.config import OlmoeConfig


class Weight(nn.Module):
    """One parameter called `weight`: the ops are functions, a module here only owns its tensor."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)


class Attention(nn.Module):
    """Attention with rotary embedding: `x` `[batch, tokens, hidden_size]`, caches of keys and values."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config
        dim, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = Weight(dim, dim), Weight(kv, dim), Weight(kv, dim)
        self.o_proj = Weight(dim, dim)
        self.q_norm, self.k_norm = Weight(dim), Weight(kv)

    def forward(self, x: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, eps = self.config, self.config.rms_norm_eps
        query = ops.rms_norm(ops.linear(x, self.q_proj.weight), self.q_norm.weight, eps)
        key = ops.rms_norm(ops.linear(x, self.k_proj.weight), self.k_norm.weight, eps)
        qkv = ops.join_qkv(query, key, ops.linear(x, self.v_proj.weight))
        heads = (config.num_attention_heads, config.num_key_value_heads)
        out, k_cache, v_cache = ops.attention(qkv, None, None, k_cache, v_cache, position, *heads, float(config.rope_theta), eps)
        return ops.linear(out, self.o_proj.weight), k_cache, v_cache


class Expert(nn.Module):
    """The three projections of one expert."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        dim, width = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = Weight(width, dim), Weight(width, dim), Weight(dim, width)


class Experts(nn.Module):
    """Mixture of experts: `x` `[batch, tokens, hidden_size]`; `gate` is the router."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.active = config.num_experts_per_tok
        self.gate = Weight(config.num_experts, config.hidden_size)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = ([getattr(expert, part).weight for expert in self.experts] for part in ("gate_proj", "up_proj", "down_proj"))
        return ops.moe(x, ops.linear(x, self.gate.weight), gate, up, down, self.active)


class DecoderLayer(nn.Module):
    """Decoder layer: attention and mixture of experts, each behind its norm, added to the residual stream."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn, self.mlp = Attention(config), Experts(config)
        self.input_layernorm, self.post_attention_layernorm = Weight(config.hidden_size), Weight(config.hidden_size)

    def forward(self, x: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = ops.rms_norm(x, self.input_layernorm.weight, self.eps)
        attended, k_cache, v_cache = self.self_attn(normed, position, k_cache, v_cache)
        x = ops.add(x, attended)
        return ops.add(x, self.mlp(ops.rms_norm(x, self.post_attention_layernorm.weight, self.eps))), k_cache, v_cache


class Decoder(nn.Module):
    """Owner of what the published names put under `model`."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Olmoe(nn.Module):
    """The whole model. `forward` takes and returns one key and one value cache `[B, K, C, d]` per layer."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.model = Decoder(config)
        self.lm_head = Weight(config.vocab_size, config.hidden_size)

    def forward(
        self, ids: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits `[B, T, vocab]` of `ids` `[B, T]` (int64) that stand at `position` (scalar int64) onwards, and the updated caches."""
        x = ops.embed(ids, self.model.embed_tokens.weight)
        keys, values = [], []
        for layer, k_cache, v_cache in zip(self.model.layers, k_caches, v_caches, strict=True):
            x, k_cache, v_cache = layer(x, position, k_cache, v_cache)
            keys.append(k_cache)
            values.append(v_cache)
        x = ops.rms_norm(x, self.model.norm.weight, self.eps)
        return ops.linear(x, self.lm_head.weight), keys, values
