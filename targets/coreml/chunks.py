"""Cuts of a model into packages, so that no weight file grows beyond a limit. Sizes come from the plan, before anything is written.

Cuts lie between layers, and every package has at least one: the embedding is with the first layer, the final norm and the head with the
last. A table that serves as both is in the first package and in the last, since packages share no weights. That costs its bytes once more;
with the embedding and the head in packages of their own it would too, and each token would take two calls more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

from elmexport.errors import ElmExportError
from elmexport.graph.ir import Graph
from elmexport.graph.partition import partition
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import Lut, PerGroupedChannel, Scheme
from elmexport.weights import Role, WeightSpec
from targets.coreml.interface import MAX_DIM

MEGABYTE = 10**6  # bytes: the unit of --max-package-mb
_BLOB = 192  # bytes at most that the file spends on one constant beside its values: a header of 64, and gaps up to multiples of 64


def plan_cuts(graph: Graph, plan: Plan, max_bytes: float) -> tuple[int, ...]:
    """The layers with which packages begin, as `elmexport.graph.partition` takes them: (0,) where one package holds all.

    As few packages as keep every weight file within `max_bytes`, and of all such cuts the one with the most equal sizes (least squares).

    Raises:
        ElmExportError: a layer, with what it cannot be parted from, takes more than `max_bytes`.
    """
    layers = len(graph.kv_heads)
    sizes = package_sizes(graph, plan)
    largest = max(range(layers), key=lambda layer: sizes[layer, layer + 1])
    if not sizes[largest, largest + 1] <= max_bytes:
        raise _too_large(graph, plan, max_bytes, largest, sizes[largest, largest + 1])

    @cache
    def best(start: int, count: int) -> tuple[float, tuple[int, ...]]:
        """The layers from `start` on in `count` packages: the sum of the squared sizes, and where packages begin."""
        if count == 1:
            size = sizes[start, layers]
            return (size**2 if size <= max_bytes else math.inf), (start,)
        cuts = ((stop, sizes[start, stop]) for stop in range(start + 1, layers - count + 2))
        found = ((size**2 + best(stop, count - 1)[0], (start, *best(stop, count - 1)[1])) for stop, size in cuts if size <= max_bytes)
        return min(found, default=(math.inf, (start,)))

    return next(starts for total, starts in (best(0, count) for count in range(1, layers + 1)) if math.isfinite(total))


def package_sizes(graph: Graph, plan: Plan) -> Mapping[tuple[int, int], int]:
    """Bytes of the weight file of a package with the layers `start` to `stop` - 1, for each `start` and `stop`: at most so many."""
    layers = range(len(graph.kv_heads))
    units = [{spec.name: stored_bytes(spec, plan.schemes[spec.name]) for spec in part.weight_specs()} for part in partition(graph, layers)]
    others = _table_bytes(graph)
    return {
        (start, stop): others + sum({name: size for unit in units[start:stop] for name, size in unit.items()}.values())
        for start in layers
        for stop in range(start + 1, len(layers) + 1)
    }


def stored_bytes(spec: WeightSpec, scheme: Scheme) -> int:
    """Bytes of a tensor in a weight file: at most so many."""
    parts = -(-spec.shape[0] // MAX_DIM) + (spec.role is Role.FFN_GATE_UP)  # gate and up lie apart
    size = -(-scheme.bits(spec.shape) // 8) + 2 * parts * _BLOB
    if isinstance(scheme, Lut):
        rows = spec.shape[0]
        group = scheme.granularity.size if isinstance(scheme.granularity, PerGroupedChannel) else rows
        size += (_most_tables(spec, group, parts) - rows // group) * scheme.entries * 2
    return size


def _most_tables(spec: WeightSpec, group: int, parts: int) -> int:
    """Tables of a tensor in `parts` with one for every `group` rows; some are repeated where a group is cut."""
    rows = spec.shape[0]
    if group == rows:
        return parts
    if group > MAX_DIM:
        return rows
    return rows // math.gcd(group, rows // 2) if spec.role is Role.FFN_GATE_UP else rows // group


def _table_bytes(graph: Graph) -> int:
    """What every package holds beside weights: cosines and sines for queries and for keys, places of tokens and of the cache."""
    return 4 * graph.context * graph.dims.head_dim * 2 + 2 * graph.context * 4 + 6 * _BLOB + 64


def _too_large(graph: Graph, plan: Plan, max_bytes: float, layer: int, size: int) -> ElmExportError:
    with_it = {0: " with the embedding", len(graph.kv_heads) - 1: " with the head"}.get(layer, "")
    least = math.ceil(size / MEGABYTE * 100) / 100
    return ElmExportError(
        f"--max-package-mb is {max_bytes / MEGABYTE:g}, and layer {layer}{with_it} alone takes {least:g} MB in {plan.recipe.name}; "
        f"models are cut between layers only: pass --max-package-mb {least:g} or more, or a --quant of fewer bits"
    )
