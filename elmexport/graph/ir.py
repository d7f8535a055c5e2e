"""Traced graph: a flat list of op-vocabulary nodes that knows every tensor's name, shape and role, and holds no weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from elmexport.graph.dims import ModelDims
from elmexport.weights import Role, WeightSpec

BATCH, TOKENS = "batch", "tokens"
ROUTED = "routed"  # tokens that went to one expert
IDS = "ids"  # the value that enters a whole model
Dim = int | str  # a number, or one of the two symbols above


@dataclass(frozen=True)
class Value:
    """Activation: `shape` may hold the symbols `batch` and `tokens`, and of what an expert reads `routed`."""

    name: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Node:
    """Node of a graph: one op.

    `inputs` maps the op's tensor arguments to value names, `weights` to weight specs (an absent optional argument is in neither; of an
    argument that is a list, `down`, the items are `down.0`, `down.1`, …),
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

    @property
    def experts(self) -> int:
        """Number of experts of a `moe` node, 0 for other ops."""
        return sum(name.startswith("down.") for name in self.weights) if self.op == "moe" else 0

    def expert_input(self, expert: int) -> str:
        """Name of the activation `[routed, D]` that one expert of a `moe` node reads: the tokens that went to it."""
        return f"{self.outputs[0]}.{expert}.input"

    def expert_hidden(self, expert: int) -> str:
        """Name of the activation `[routed, F]` that the down projection of one expert of a `moe` node reads."""
        return f"{self.outputs[0]}.{expert}.hidden"

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the activations that observers of a forward pass are shown when the node runs: its output, and what its experts read."""
        inside = (name for expert in range(self.experts) for name in (self.expert_input(expert), self.expert_hidden(expert)))
        return (*inside, self.outputs[0])


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
        found = {}
        for node in self.nodes:
            if node.op == "linear":
                found[node.weights["weight"].name] = node.inputs["x"]
            for expert in range(node.experts):
                for part, name in (("gate", node.expert_input), ("up", node.expert_input), ("down", node.expert_hidden)):
                    found[node.weights[f"{part}.{expert}"].name] = name(expert)
        return found

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
