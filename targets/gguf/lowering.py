"""Lowering of the traced graph to llama.cpp's tensors: which of them each weight becomes.

llama.cpp builds the computation itself, from the architecture's name and the sizes in the metadata. So an op lowers to the names that its
weights go by, and ops without weights to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from elmexport.graph.ir import Graph
from elmexport.models.base import ModelConfig
from elmexport.weights import WeightSpec
from targets.gguf.families import Architecture, architecture

# What a file of the architectures in `families` can compute.
_OPS = frozenset({"embed", "linear", "rms_norm", "join_qkv", "attention", "swiglu", "moe", "add"})


@dataclass(frozen=True)
class Entry:
    """Weights and the tensors that they become.

    One weight, its rows in as many equal parts as there are `names`; or those of all experts of a layer, stacked in one tensor.
    """

    specs: tuple[WeightSpec, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.spec.shape[0] % len(self.names) == 0
        assert len(self.specs) == 1 or len(self.names) == 1

    @property
    def spec(self) -> WeightSpec:
        """The weight, or the first expert's."""
        return self.specs[0]

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of what one weight gives to each of the tensors: all of it, or a slice of a stack."""
        rows, *rest = self.spec.shape
        return (rows // len(self.names), *rest)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of the tensors: `[out, in]`, `[experts, out, in]` or `[dim]`."""
        return self.part_shape if self.spec.expert is None else (len(self.specs), *self.part_shape)


def lower(graph: Graph, kind: Architecture) -> list[Entry]:
    """The tensors of every weight, in forward order; a tied head is the embedding's."""
    for node in graph.nodes:
        # llama.cpp has no place for a rescaled residual stream, and computing in float32 needs none.
        assert node.weight_scale == 1.0, f"{node.name} is rescaled; gguf recipes compute in fp32"
        assert node.op in _OPS, f"{node.name}: llama.cpp has no {node.op} here; the architecture's requirements should refuse such models"
    return _entries(graph.weight_specs(), kind)


def matrices(config: ModelConfig) -> list[Entry]:
    """The tensors of every matrix."""
    return _entries((spec for spec in config.weights() if not spec.role.is_norm), architecture(config))


def _entries(specs: Iterable[WeightSpec], kind: Architecture) -> list[Entry]:
    """The tensors of `specs`, in their order; a stack stands where its first expert does."""
    by_names: dict[tuple[str, ...], list[WeightSpec]] = {}
    for spec in specs:
        prefix = "" if spec.layer is None else f"blk.{spec.layer}."
        by_names.setdefault(tuple(f"{prefix}{name}.weight" for name in kind.tensors[spec.role]), []).append(spec)
    return [Entry(tuple(found), names) for names, found in by_names.items()]
