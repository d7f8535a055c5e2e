"""Dimensions of a decoder-only language model, whatever its family: what a graph knows of the model beside its nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerDims:
    """Sizes of one transformer layer."""

    query_heads: int
    kv_heads: int
    ffn_dim: int  # of one expert, where there are several
    experts: int = 0  # of a mixture; 0: one feed-forward network for all tokens
    active_experts: int = 0  # that a token goes to

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that read one KV head (grouped-query attention)."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a model. `tied`: the LM head is the embedding's table, no tensor of its own."""

    vocab_size: int
    model_dim: int
    head_dim: int
    layers: tuple[LayerDims, ...]
    context: int  # tokens that the model was trained on
    max_context: int  # the most that a KV cache may hold, as far as its position embedding reaches
    tied: bool
