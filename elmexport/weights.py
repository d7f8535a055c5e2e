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
    MOE_ROUTER = "moe.router"  # which experts a token goes to
    MOE_EXPERTS_GATE = "moe.experts.gate"
    MOE_EXPERTS_UP = "moe.experts.up"
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
    def is_quantized(self) -> bool:
        """Whether recipes choose a scheme for tensors of this role: norms and routers, which are small, keep the precision of norms."""
        return not self.is_norm and self is not Role.MOE_ROUTER

    @property
    def is_expert(self) -> bool:
        """Whether each expert of a layer has a tensor of its own."""
        return self in (Role.MOE_EXPERTS_GATE, Role.MOE_EXPERTS_UP, Role.MOE_EXPERTS_DOWN)

    @property
    def writes_to_stream(self) -> bool:
        """Whether the output of the tensor's node is added to the residual stream."""
        return self in (Role.EMBEDDING, Role.ATTENTION_OUT, Role.FFN_DOWN, Role.MOE_EXPERTS_DOWN)


@dataclass(frozen=True)
class WeightSpec:
    """Specification of one tensor of a model.

    `name` is as in the family's published checkpoints, `shape` `[out, in]` for matrices, `layer` None outside the layers. Every expert of a
    mixture has tensors of its own, so that they can be read, quantized and written one at a time; `expert` is its number, else None.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def group(self) -> str:
        """Name of the tensor; of an expert's, one that all experts of the layer share: `…experts.*.down_proj.weight`."""
        return self.name if self.expert is None else ".*.".join(self.name.rsplit(f".{self.expert}.", 1))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
