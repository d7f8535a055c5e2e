"""From the traced graph to llama.cpp's tensors: which of them each weight becomes.

llama.cpp builds the computation itself, from the architecture's name and the sizes in the metadata. So an op lowers to the names that its
weights go by, and ops without weights to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from elmexport.graph.ir import Graph, Node
from elmexport.models.openelm_config import OpenELMConfig
from elmexport.weights import Role, WeightSpec


@dataclass(frozen=True)
class Entry:
    """One weight and the tensors that it becomes: its rows in as many equal parts as there are `names`."""

    spec: WeightSpec
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.spec.shape[0] % len(self.names) == 0

    @property
    def part_shape(self) -> tuple[int, ...]:
        rows, *rest = self.spec.shape
        return (rows // len(self.names), *rest)


def lower(graph: Graph) -> list[Entry]:
    """The tensors of every weight, in forward order."""
    entries = []
    for node in graph.nodes:
        # llama.cpp has no place for a rescaled residual stream, and computing in float32 needs none.
        assert node.weight_scale == 1.0, f"{node.name} is rescaled; gguf recipes compute in fp32"
        entries += _LOWERINGS[node.op](node)
    return entries


def matrices(config: OpenELMConfig) -> list[Entry]:
    """The tensors of every matrix."""
    return [_matrix(spec) for spec in config.weights() if spec.role is not Role.NORM]


def _matrix(spec: WeightSpec) -> Entry:
    prefix = "" if spec.layer is None else f"blk.{spec.layer}."
    return Entry(spec, tuple(f"{prefix}{name}.weight" for name in _MATRIX_NAMES[spec.role]))


def _embed(node: Node) -> list[Entry]:
    return [_matrix(node.weights["table"])]


def _linear(node: Node) -> list[Entry]:
    spec = node.weights["weight"]
    if node.role is Role.LM_HEAD:
        assert spec.role is Role.EMBEDDING, "the architecture has no output.weight; GgufTarget.check refuses such models"
        return []
    return [_matrix(spec)]


def _rms_norm(node: Node) -> list[Entry]:
    spec = node.weights["weight"]
    if spec.layer is None:
        return [Entry(spec, ("output_norm.weight",))]
    # Apple and llama.cpp agree on the names attn_norm and ffn_norm.
    return [Entry(spec, (f"blk.{spec.layer}.{spec.name.split('.')[-2]}.weight",))]


def _attention(node: Node) -> list[Entry]:
    return [Entry(node.weights[f"{x}_norm"], (f"blk.{node.layer}.attn_{x}_norm.weight",)) for x in "qk"]


def _nothing(node: Node) -> list[Entry]:
    return []


_MATRIX_NAMES: Mapping[Role, tuple[str, ...]] = {
    Role.EMBEDDING: ("token_embd",),
    Role.ATTENTION_QKV: ("attn_qkv",),
    Role.ATTENTION_OUT: ("attn_output",),
    Role.FFN_GATE_UP: ("ffn_gate", "ffn_up"),  # the gate is the first half
    Role.FFN_DOWN: ("ffn_down",),
}
_LOWERINGS: Mapping[str, Callable[[Node], list[Entry]]] = {
    "embed": _embed,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "attention": _attention,
    "swiglu": _nothing,
    "add": _nothing,
}
