"""Traced graph: a flat list of op-vocabulary nodes that knows every tensor's name, shape and role, and holds no weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from elmexport.graph.dims import ModelDims
from elmexport.weights import Role, WeightSpec

BATCH, TOKENS = "batch", "tokens"
IDS = "ids"  # the value that enters a whole model
Dim = int | str  # a number, or one of the two symbols above


@dataclass(frozen=True)
class Value:
    """Activation: `shape` may hold the symbols `batch` and `tokens`."""

    name: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Node:
    """Node of a graph: one op.

    `inputs` maps the op's tensor arguments to value names, `weights` to weight specs (an absent optional argument is in neither),
    `attrs` holds the rest. `role` says what a `linear` or `embed` does here, also where it borrows a tied tensor of another role.
    `weight_scale` is an exact power of two by which a target multiplies the weight (see `elmexport.graph.rescale`).
    """

    op: str
    name: str
    inputs: dict[str, str]
    weights: dict[str, WeightSpec]
    attrs: dict[str, Any]
    outputs: tuple[str, ...]
    layer: int | None
    role: Role | None = None
    weight_scale: float = 1.0


@dataclass(frozen=True)
class Graph:
    """Traced forward pass over a static KV cache of `context` tokens. It is a whole model, or some layers (`elmexport.graph.partition`).

    Inputs: `source`, `position` scalar int64, `k_cache.N` and `v_cache.N` `[batch, K_N, context, d]` of each layer. Outputs: `result`, and the
    caches as the nodes named in `present_keys`, `present_values` return them. `source` and `result` are values: the token ids `ids` `[batch,
    tokens]` int64 and the logits `[batch, tokens, vocab]`; where another part of the model comes before or after, the residual stream
    `[batch, tokens, D]`.
    """

    dims: ModelDims
    context: int
    nodes: tuple[Node, ...]
    values: dict[str, Value] = field(repr=False)
    result: str
    present_keys: tuple[str, ...]
    present_values: tuple[str, ...]
    source: str = IDS

    @property
    def is_first(self) -> bool:
        """Whether token ids enter: the embedding is here."""
        return self.source == IDS

    @property
    def is_last(self) -> bool:
        """Whether logits leave: the head is here."""
        return any(node.role is Role.LM_HEAD for node in self.nodes)

    @cached_property
    def attentions(self) -> tuple[Node, ...]:
        """The attention nodes, in the order of the layers."""
        return tuple(node for node in self.nodes if node.op == "attention")

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, the same in every layer."""
        (theta,) = {float(node.attrs["rope_theta"]) for node in self.attentions}
        return theta

    @cached_property
    def kv_heads(self) -> dict[int, int]:
        """KV heads of each layer that is here, by its number."""
        return {node.layer: node.attrs["kv_heads"] for node in self.attentions if node.layer is not None}

    @cached_property
    def linear_inputs(self) -> dict[str, str]:
        """Name of each weight that multiplies activations to that of the activation."""
        return {node.weights["weight"].name: node.inputs["x"] for node in self.nodes if node.op == "linear"}

    def weight_specs(self) -> Iterator[WeightSpec]:
        """Every distinct weight, in the order of first use."""
        seen: set[str] = set()
        for node in self.nodes:
            for spec in node.weights.values():
                if spec.name not in seen:
                    seen.add(spec.name)
                    yield spec

    def with_nodes(self, nodes: tuple[Node, ...]) -> Graph:
        return replace(self, nodes=nodes)
