"""Lowering of the traced graph to llama.cpp's tensors: which of them each weight becomes.

llama.cpp builds the computation itself, from the architecture's name and the sizes in the metadata. So an op lowers to the names that its
weights go by, and ops without weights to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from elmexport.graph.ir import Graph
from elmexport.models.base import ModelConfig
from elmexport.weights import WeightSpec
from targets.gguf.families import Architecture, architecture

# What a file of the architectures in `families` can compute.
_OPS = frozenset({"embed", "linear", "rms_norm", "attention", "swiglu", "add"})


@dataclass(frozen=True)
class Entry:
    """One weight and the tensors that it becomes: its rows in as many equal parts as there are `names`."""

    spec: WeightSpec
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.spec.shape[0] % len(self.names) == 0

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of each of the tensors."""
        rows, *rest = self.spec.shape
        return (rows // len(self.names), *rest)


def lower(graph: Graph, kind: Architecture) -> list[Entry]:
    """The tensors of every weight, in forward order; a tied head is the embedding's."""
    for node in graph.nodes:
        # llama.cpp has no place for a rescaled residual stream, and computing in float32 needs none.
        assert node.weight_scale == 1.0, f"{node.name} is rescaled; gguf recipes compute in fp32"
        assert node.op in _OPS, f"{node.name}: llama.cpp has no {node.op} here; the architecture's requirements should refuse such models"
    return [_entry(spec, kind) for spec in graph.weight_specs()]


def matrices(config: ModelConfig) -> list[Entry]:
    """The tensors of every matrix."""
    kind = architecture(config)
    return [_entry(spec, kind) for spec in config.weights() if not spec.role.is_norm]


def _entry(spec: WeightSpec, kind: Architecture) -> Entry:
    prefix = "" if spec.layer is None else f"blk.{spec.layer}."
    return Entry(spec, tuple(f"{prefix}{name}.weight" for name in kind.tensors[spec.role]))
