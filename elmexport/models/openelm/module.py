"""OpenELM in the op vocabulary: a decoder whose layers differ in query heads, KV heads and FFN width.

Parameter names are Apple's, so a state dict loads as it is. The KV cache is functional: it comes in as arguments and goes out as
results, for the targets to turn into states, shared buffers, or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elmexport.graph import ops
from elmexport.graph.dims import LayerDims
from elmexport.models.openelm.config import RMS_NORM_EPS, OpenELMConfig


class Weight(nn.Module):
    """One parameter called `weight`: the ops are functions, a module here only owns its tensor."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding: `x` `[batch, tokens, model_dim]`, caches of keys and values."""

    def __init__(self, config: OpenELMConfig, layer: LayerDims) -> None:
        super().__init__()
        self.layer, self.rope_theta = layer, float(config.rope_freq_constant)
        self.qkv_proj = Weight((layer.query_heads + 2 * layer.kv_heads) * config.head_dim, config.model_dim)
        self.out_proj = Weight(config.model_dim, layer.query_heads * config.head_dim)
        self.q_norm = Weight(config.head_dim) if config.normalize_qk_projections else None
        self.k_norm = Weight(config.head_dim) if config.normalize_qk_projections else None

    def forward(self, x: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, k_cache, v_cache = ops.attention(
            ops.linear(x, self.qkv_proj.weight),
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            k_cache,
            v_cache,
            position,
            self.layer.query_heads,
            self.layer.kv_heads,
            self.rope_theta,
            RMS_NORM_EPS,
        )
        return ops.linear(out, self.out_proj.weight), k_cache, v_cache


class FeedForward(nn.Module):
    """Feed-forward network, gated (SwiGLU) or not (SiLU): `x` `[batch, tokens, model_dim]`."""

    def __init__(self, config: OpenELMConfig, layer: LayerDims) -> None:
        super().__init__()
        self.gated = config.ffn_with_glu
        self.proj_1 = Weight(layer.ffn_dim * (2 if self.gated else 1), config.model_dim)
        self.proj_2 = Weight(config.model_dim, layer.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = ops.linear(x, self.proj_1.weight)
        return ops.linear(ops.swiglu(hidden) if self.gated else ops.silu(hidden), self.proj_2.weight)


class DecoderLayer(nn.Module):
    """Decoder layer: attention and feed-forward network, each behind its norm, added to the residual stream."""

    def __init__(self, config: OpenELMConfig, layer: LayerDims) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(config, layer)
        self.attn_norm = Weight(config.model_dim)
        self.ffn_norm = Weight(config.model_dim)

    def forward(self, x: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, k_cache, v_cache = self.attn(ops.rms_norm(x, self.attn_norm.weight, RMS_NORM_EPS), position, k_cache, v_cache)
        x = ops.add(x, attended)
        return ops.add(x, self.ffn(ops.rms_norm(x, self.ffn_norm.weight, RMS_NORM_EPS))), k_cache, v_cache


class Decoder(nn.Module):
    """Owner of what Apple's names put under `transformer`."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.token_embeddings = Weight(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in config.layers)
        self.norm = Weight(config.model_dim)


class OpenELM(nn.Module):
    """The whole model. `forward` takes and returns one key and one value cache `[B, K_n, C, d]` per layer n."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.transformer = Decoder(config)
        self.lm_head = None if config.share_input_output_layers else Weight(config.vocab_size, config.model_dim)

    def forward(
        self, ids: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits `[B, T, vocab]` of `ids` `[B, T]` (int64) that stand at `position` (scalar int64) onwards, and the updated caches."""
        embeddings = self.transformer.token_embeddings.weight
        x = ops.embed(ids, embeddings)
        keys, values = [], []
        for layer, k_cache, v_cache in zip(self.transformer.layers, k_caches, v_caches, strict=True):
            x, k_cache, v_cache = layer(x, position, k_cache, v_cache)
            keys.append(k_cache)
            values.append(v_cache)
        x = ops.rms_norm(x, self.transformer.norm.weight, RMS_NORM_EPS)
        return ops.linear(x, embeddings if self.lm_head is None else self.lm_head.weight), keys, values
