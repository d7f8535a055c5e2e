"""From the op vocabulary to MIL in the form that the Neural Engine runs best: one function for a fixed number of tokens.

Activations are `[1, channels, 1, tokens]` fp16, projections 1x1 convolutions, every shape static, no rank above 5 and no dimension above
16384 but that of the logits. Attention and the norms are in `attention` and `norm`. Not here: a form for GPUs, models cut into chunks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types

from elmexport.graph.ir import Graph, Node
from elmexport.runtimes.coreml import INPUT_IDS, KEY_CACHE, LOGITS, POSITION, VALUE_CACHE
from elmexport.weights import Role
from targets.coreml.attention import Attention
from targets.coreml.interface import cache_shape
from targets.coreml.norm import rms_norm
from targets.coreml.packing import Matrix, Part, Var, WeightFile, identifier

Vars = tuple[Var, ...]


def lower(graph: Graph, tokens: int, file: WeightFile) -> Function:
    """The function that runs `graph` on `tokens` tokens; see `targets.coreml.interface` for its inputs, states and output."""
    cache = cache_shape(graph)
    inputs = {
        INPUT_IDS: mb.TensorSpec((1, tokens), dtype=types.int32),
        POSITION: mb.TensorSpec((1,), dtype=types.int32),
        KEY_CACHE: mb.StateTensorSpec(cache, dtype=types.fp16),
        VALUE_CACHE: mb.StateTensorSpec(cache, dtype=types.fp16),
    }
    with _fresh_names(), Function(inputs, opset_version=ct.target.iOS18) as function:
        lowering = Lowering(graph, tokens, file, function.inputs)
        for node in graph.nodes:
            lowering.values[node.outputs[0]] = LOWERINGS[node.op](lowering, node)
        function.set_outputs(list(lowering.values[graph.logits]))
    return function


class Lowering:
    """What the lowerings of one function share. `values` holds activations: one variable each, but two for gate and up."""

    def __init__(self, graph: Graph, tokens: int, file: WeightFile, inputs: Mapping[str, Var]) -> None:
        self.graph, self.tokens, self.file = graph, tokens, file
        self.ids = inputs[INPUT_IDS]
        self.attention = Attention(graph, tokens, file, inputs)
        self.values: dict[str, Vars] = {}
        self._parts: dict[str, Var] = {}

    def input(self, node: Node, argument: str = "x") -> Var:
        (value,) = self.values[node.inputs[argument]]
        return value

    def part(self, part: Part) -> Var:
        """The constant for `part`, the same one when asked again: a tied head and the embedding share it."""
        if part.name not in self._parts:
            self._parts[part.name] = self.file.part(part)
        return self._parts[part.name]


def _embed(lowering: Lowering, node: Node) -> Vars:
    """Rows of a table that may lie in several parts, because no dimension may exceed the Neural Engine's largest."""
    spec = node.weights["table"]
    tied = any(spec in other.weights.values() for other in lowering.graph.nodes if other is not node)
    matrix = lowering.file.matrix(spec, 1, 1.0 if tied else node.weight_scale)
    ids = mb.squeeze(x=lowering.ids, axes=[0])
    rows = _gather(lowering, matrix, ids)  # [tokens, D, 1, 1]
    x = mb.transpose(x=rows, perm=[2, 1, 3, 0])
    factor = matrix.factor * node.weight_scale if tied else matrix.factor
    return (_times(x, factor),)


def _gather(lowering: Lowering, matrix: Matrix, ids: Var) -> Var:
    first, *others = matrix.parts
    if not others:
        return mb.gather(x=lowering.part(first), indices=ids, axis=0)
    start = first.values.shape[0]
    rows = mb.gather(x=lowering.part(first), indices=mb.minimum(x=ids, y=np.int32(start - 1)), axis=0)
    for part in others:
        size = part.values.shape[0]
        index = mb.sub(x=ids, y=np.int32(start))
        inside = mb.minimum(x=mb.maximum(x=index, y=np.int32(0)), y=np.int32(size - 1))
        found = mb.gather(x=lowering.part(part), indices=inside, axis=0)
        here = mb.reshape(x=mb.greater_equal(x=index, y=np.int32(0)), shape=[lowering.tokens, 1, 1, 1])
        rows = mb.select(cond=here, a=found, b=rows)
        start += size
    return rows


def _linear(lowering: Lowering, node: Node) -> Vars:
    # Gate and up are two convolutions: nothing has to cut their output, and the 3B model's would be too wide as one.
    gated = node.role is Role.FFN_GATE_UP and lowering.graph.config.ffn_with_glu
    matrix = lowering.file.matrix(node.weights["weight"], 2 if gated else 1, node.weight_scale)
    # A factor that the weight cannot take goes on the input, so that the product stays as small as it would be.
    x = _times(lowering.input(node), matrix.factor)
    name = identifier(node.name)
    outputs = tuple(mb.conv(x=x, weight=lowering.part(part), name=f"{name}_{i}") for i, part in enumerate(matrix.parts))
    return (_logits(outputs),) if node.role is Role.LM_HEAD else outputs


def _logits(parts: Vars) -> Var:
    """`[1, tokens, vocab]` from the head's parts `[1, n, 1, tokens]`."""
    turned = [mb.transpose(x=mb.squeeze(x=part, axes=[2]), perm=[0, 2, 1]) for part in parts[:-1]]
    last = mb.squeeze(x=parts[-1], axes=[2])
    if not turned:
        return mb.transpose(x=last, perm=[0, 2, 1], name=LOGITS)
    return mb.concat(values=[*turned, mb.transpose(x=last, perm=[0, 2, 1])], axis=2, name=LOGITS)


def _rms_norm(lowering: Lowering, node: Node) -> Vars:
    spec = node.weights["weight"]
    weight = lowering.file.vector(spec, (1, spec.size, 1, 1))
    return (rms_norm(lowering.input(node), weight, node.attrs["eps"], axis=1),)


def _attention(lowering: Lowering, node: Node) -> Vars:
    return (lowering.attention(lowering.input(node, "qkv"), node),)


def _swiglu(lowering: Lowering, node: Node) -> Vars:
    gate, up = lowering.values[node.inputs["gate_up"]]
    return (mb.mul(x=mb.silu(x=gate), y=up),)


def _silu(lowering: Lowering, node: Node) -> Vars:
    return (mb.silu(x=lowering.input(node)),)


def _add(lowering: Lowering, node: Node) -> Vars:
    return (mb.add(x=lowering.input(node, "x"), y=lowering.input(node, "y")),)


LOWERINGS: Mapping[str, Callable[[Lowering, Node], Vars]] = {
    "embed": _embed,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "attention": _attention,
    "swiglu": _swiglu,
    "silu": _silu,
    "add": _add,
}


def _times(x: Var, factor: float) -> Var:
    return x if factor == 1.0 else mb.mul(x=x, y=np.float16(factor))


@contextmanager
def _fresh_names() -> Iterator[None]:
    """Number unnamed ops and constants from 0, so that a package's bytes do not depend on what was built before it."""
    before = mb.name_count
    mb.name_count = defaultdict(int)
    try:
        yield
    finally:
        mb.name_count = before
