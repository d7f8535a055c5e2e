"""Weight specifications: name, shape, role and layer of a model's tensors, before anyone reads one.

Recipes, lowerings and checkpoints all speak of tensors through `WeightSpec`; roles are what quantization rules match on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """Function of a tensor in the network; the values are the roles that recipe files name."""

    EMBEDDING = "embedding"
    ATTENTION_Q = "attention.q"
    ATTENTION_K = "attention.k"
    ATTENTION_V = "attention.v"
    ATTENTION_QKV = "attention.qkv"  # the three in one matrix, rows in this order
    ATTENTION_OUT = "attention.out"
    FFN_GATE = "ffn.gate"
    FFN_UP = "ffn.up"
    FFN_GATE_UP = "ffn.gate_up"  # the two in one matrix, the gate's rows first
    FFN_DOWN = "ffn.down"
    MOE_ROUTER = "moe.router"
    MOE_EXPERTS_GATE_UP = "moe.experts.gate_up"
    MOE_EXPERTS_DOWN = "moe.experts.down"
    LM_HEAD = "lm_head"
    NORM_ATTENTION = "norm.attention"  # before the attention
    NORM_FFN = "norm.ffn"  # before the feed-forward network
    NORM_QUERY = "norm.query"
    NORM_KEY = "norm.key"
    NORM_FINAL = "norm.final"

    @property
    def is_norm(self) -> bool:
        """Whether the tensor is a norm's weight, a vector that is never quantized."""
        return self.value.startswith("norm.")

    @property
    def writes_to_stream(self) -> bool:
        """Whether the output of the tensor's node is added to the residual stream."""
        return self in (Role.EMBEDDING, Role.ATTENTION_OUT, Role.FFN_DOWN, Role.MOE_EXPERTS_DOWN)


@dataclass(frozen=True)
class WeightSpec:
    """Specification of one tensor of a model.

    `name` is as in the family's published checkpoints, `shape` `[out, in]` for matrices (`[experts, out, in]` for those of experts),
    `layer` None outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
