"""Lowering of the traced graph to mlx-lm's modules: what each weight is multiplied by, and the one eps of all norms.

mlx-lm builds the computation itself, from `config.json`. So an op lowers to the module that its weight belongs to, and ops without
weights to nothing. There is no place for a factor between two ops, and one eps for all norms. Where the residual stream is multiplied by
`alpha` (`elmexport.graph.rescale`), the factors are therefore moved to where they come out even:

- A layer whose queries and keys pass norms is multiplied in `attention.qkv` instead of `attention.out`: values carry the factor to the output,
  and the norms of queries and keys, whose input is smaller by `alpha` too, want the same eps as all others. Exact.
- A tied head reads the embedding times `alpha`; the final norm is multiplied by `1 / alpha`. Exact, as long as what leaves that norm fits
  into fp16 for any input; where it might not, the head gets a table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from elmexport.graph.ir import Graph
from elmexport.weights import Role, WeightSpec

OPS = frozenset({"embed", "linear", "rms_norm", "join_qkv", "attention", "swiglu", "moe", "add"})
QKV = frozenset({Role.ATTENTION_QKV, Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V})
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Entry:
    """One module that has weights: `path` as mlx-lm calls it, and the power of two by which its weight is multiplied.

    `specs` is one weight, or those of all experts of a layer, which the module holds stacked.
    """

    specs: tuple[WeightSpec, ...]
    path: str
    factor: float

    @property
    def spec(self) -> WeightSpec:
        """The weight, or the first expert's."""
        return self.specs[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the module's weight: `[out, in]`, `[experts, out, in]` or `[dim]`."""
        return self.spec.shape if self.spec.expert is None else (len(self.specs), *self.spec.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(spec.size for spec in self.specs)


@dataclass(frozen=True)
class Modules:
    """The modules of a model in forward order, the eps of their norms, and the factor on the residual stream.

    `tied`: the head is the embedding's table, no module of its own.
    """

    entries: tuple[Entry, ...]
    eps: float
    alpha: float
    tied: bool


def lower(graph: Graph, head_path: str, final_norm_peak: float) -> Modules:
    """Lower `graph`, whose head would be the module `head_path`. `final_norm_peak` is the largest magnitude of the final norm's weight."""
    alpha = next(node.weight_scale for node in graph.nodes if node.op == "embed")
    tied = graph.dims.tied
    # No input of an RMS norm leaves it larger than the square root of its length, times the weight.
    split = tied and graph.dims.model_dim**0.5 * final_norm_peak / alpha > FP16_MAX
    normed = {node.layer for node in graph.attentions if "q_norm" in node.weights}
    normed |= {node.layer for node in graph.nodes if node.op == "rms_norm" and node.weights["weight"].role is Role.NORM_QUERY}
    factors: dict[str, float] = {}
    specs: dict[str, WeightSpec] = {}
    eps: set[float] = set()
    for node in graph.nodes:
        assert node.op in OPS, f"{node.name}: mlx-lm has no {node.op} here; the class's requirements should refuse such models"
        if node.op == "rms_norm":
            of_heads = node.weights["weight"].role in (Role.NORM_QUERY, Role.NORM_KEY)
            eps.add(node.attrs["eps"] * (alpha**2 if of_heads else 1.0))
        for spec in node.weights.values():
            factor = node.weight_scale
            if spec.role in (Role.MOE_EXPERTS_GATE, Role.MOE_EXPERTS_UP):
                factor = 1.0  # the scale is that of the experts' results
            elif node.layer in normed and node.role is Role.ATTENTION_OUT:
                factor = 1.0
            elif node.layer in normed and node.role in QKV:
                factor *= alpha
            elif spec.role is Role.NORM_FINAL and tied and not split:
                factor /= alpha
            specs.setdefault(spec.name, spec)
            factors.setdefault(spec.name, factor)  # a tied table's is that of the embedding, which comes first
    for node in graph.attentions:
        if "q_norm" in node.weights:
            eps.add(node.attrs["eps"] * alpha**2)
    (one,) = eps
    modules: dict[str, list[WeightSpec]] = {}
    for spec in specs.values():
        modules.setdefault(path(spec), []).append(spec)
    entries = [Entry(tuple(found), name, factors[found[0].name]) for name, found in modules.items()]
    if split:
        table = next(spec for spec in specs.values() if spec.role is Role.EMBEDDING)
        entries.append(Entry((table,), head_path, 1.0))
    return Modules(tuple(entries), one, alpha, tied and not split)


def path(spec: WeightSpec) -> str:
    """Name the module of a weight: mlx-lm's classes have the names of the published checkpoints, but for experts, which they stack."""
    return spec.group.replace("experts.*", "switch_mlp").removesuffix(".weight")
