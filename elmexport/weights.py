"""What a weight tensor is, before anyone reads one: its name, shape, role and layer.

Recipes, lowerings and checkpoints all speak of tensors through `WeightSpec`; roles are what quantization rules match on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a tensor does in the network."""

    EMBEDDING = "embedding"
    ATTENTION_QKV = "attention.qkv"
    ATTENTION_OUT = "attention.out"
    FFN_GATE_UP = "ffn.gate_up"
    FFN_DOWN = "ffn.down"
    LM_HEAD = "lm_head"
    NORM = "norm"


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of a model: `name` as in Apple's checkpoints, `shape` `[out, in]` for matrices, `layer` None outside the layers."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
