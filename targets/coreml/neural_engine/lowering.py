"""Lowering of the op vocabulary to MIL in the form that the Neural Engine runs best: one function for a fixed number of tokens.

Activations are `[1, channels, 1, tokens]` fp16, projections 1x1 convolutions, every shape static, no rank above 5 and no dimension above
16384. Attention, the cache, the norms and what follows the head are in modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types

from elmexport.contracts.coreml import HIDDEN, HIDDEN_OUT, INPUT_IDS, KEY_CACHE, LAST_TOKEN, POSITION, VALUE_CACHE, Interface
from elmexport.graph.ir import Graph, Node
from elmexport.weights import Role
from targets.coreml.building import fresh_names, held, times
from targets.coreml.head_range import LOGIT_SCALE
from targets.coreml.interface import cache_shape
from targets.coreml.neural_engine.attention import HeadwiseAttention
from targets.coreml.neural_engine.cache import InputCache, StateCache
from targets.coreml.neural_engine.head import logits, most_likely
from targets.coreml.norm import rms_norm
from targets.coreml.packing import Matrix, Var, WeightFile, identifier

Vars = tuple[Var, ...]


def lower(graph: Graph, tokens: int, file: WeightFile, interface: Interface) -> Function:
    """Lower `graph` to a function of `tokens` tokens; see `elmexport.contracts.coreml` for its inputs, states and outputs."""
    cache = mb.TensorSpec if interface.cache_io else mb.StateTensorSpec
    if graph.is_first:
        inputs = {INPUT_IDS: mb.TensorSpec((1, tokens), dtype=types.int32)}
    else:
        inputs = {HIDDEN: mb.TensorSpec((1, 1, tokens, graph.dims.model_dim), dtype=types.fp16)}
    inputs[POSITION] = mb.TensorSpec((1,), dtype=types.int32)
    if tokens > 1 and graph.is_last:
        inputs[LAST_TOKEN] = mb.TensorSpec((1,), dtype=types.int32)
    inputs |= {name: cache(cache_shape(graph), dtype=types.fp16) for name in (KEY_CACHE, VALUE_CACHE)}
    with fresh_names(), Function(inputs, opset_version=ct.target.iOS18) as function:
        lowering = NeuralEngineLowering(graph, tokens, file, interface, function.inputs)
        if not graph.is_first:
            lowering.values[graph.source] = (mb.transpose(x=function.inputs[HIDDEN], perm=[0, 3, 1, 2]),)
        for node in graph.nodes:
            lowering.values[node.outputs[0]] = LOWERINGS[node.op](lowering, node)
        result = lowering.values[graph.result]
        if not graph.is_last:
            # Channels last between packages: what a package takes and gives is to fill whole units of 64 bytes.
            result = (mb.transpose(x=result[0], perm=[0, 2, 3, 1], name=HIDDEN_OUT),)
        function.set_outputs([*result, *lowering.cache.outputs()])
    return function


class NeuralEngineLowering:
    """State that the lowerings of one function's nodes share.

    `values` holds activations: one variable each, but two for gate and up, and as many for the result as the head has parts.
    """

    def __init__(self, graph: Graph, tokens: int, file: WeightFile, interface: Interface, inputs: Mapping[str, Var]) -> None:
        self.graph, self.tokens, self.file, self.interface, self.inputs = graph, tokens, file, interface, inputs
        self.cache = (InputCache if interface.cache_io else StateCache)(graph, tokens, file, inputs)
        self.attention = HeadwiseAttention(graph, tokens, file, self.cache)
        self.picked = self._picked() if tokens > 1 and graph.is_last else None
        self.values: dict[str, Vars] = {}

    def input(self, node: Node, argument: str = "x") -> Var:
        (value,) = self.values[node.inputs[argument]]
        return value

    def _picked(self) -> Var:
        """One-hot column `[1, 1, tokens, 1]` of the last token's place."""
        places = self.file.table("places", lambda: np.arange(self.tokens, dtype=np.int32)[None, None, :, None])
        return mb.cast(x=mb.equal(x=places, y=self.inputs[LAST_TOKEN]), dtype="fp16")


def _embed(lowering: NeuralEngineLowering, node: Node) -> Vars:
    """Look up rows of a table that may lie in several parts, because no dimension may exceed the Neural Engine's largest."""
    spec = node.weights["table"]
    tied = lowering.graph.dims.tied
    matrix = lowering.file.matrix(spec, 1, 1.0 if tied else node.weight_scale)
    ids = mb.squeeze(x=lowering.inputs[INPUT_IDS], axes=[0])
    rows = _gather(lowering, matrix, ids)
    x = mb.reshape(x=mb.transpose(x=rows, perm=[1, 0]), shape=[1, spec.shape[1], 1, lowering.tokens])
    factor = matrix.factor * node.weight_scale if tied else matrix.factor
    return (times(x, factor),)


def _gather(lowering: NeuralEngineLowering, matrix: Matrix, ids: Var) -> Var:
    """`[tokens, D]`. Not `[tokens, D, 1, 1]`, as the table's parts lie in convolutions: last axes of length one are padded to 64 bytes."""
    first, *others = matrix.parts
    table = lowering.file.rows(first)
    if not others:
        return mb.gather(x=table, indices=ids, axis=0)
    start = first.values.shape[0]
    rows = mb.gather(x=table, indices=mb.minimum(x=ids, y=np.int32(start - 1)), axis=0)
    for part in others:
        size = part.values.shape[0]
        index = mb.sub(x=ids, y=np.int32(start))
        inside = mb.minimum(x=mb.maximum(x=index, y=np.int32(0)), y=np.int32(size - 1))
        found = mb.gather(x=lowering.file.rows(part), indices=inside, axis=0)
        here = mb.reshape(x=mb.greater_equal(x=index, y=np.int32(0)), shape=[lowering.tokens, 1])
        rows = mb.select(cond=here, a=found, b=rows)
        start += size
    return rows


def _linear(lowering: NeuralEngineLowering, node: Node) -> Vars:
    # Gate and up are two convolutions: nothing has to cut their output, and the 3B model's would be too wide as one.
    gated = node.role is Role.FFN_GATE_UP
    matrix = lowering.file.matrix(node.weights["weight"], 2 if gated else 1, node.weight_scale)
    x = lowering.input(node)
    if node.role is Role.LM_HEAD and lowering.picked is not None:
        x = _pick(x, lowering.picked)
    # A factor that the weight cannot take goes on the input, so that the product stays as small as it would be.
    scale = node.attrs.get(LOGIT_SCALE, 1.0)
    x = times(x, matrix.factor * scale)
    name = identifier(node.name)
    outputs = tuple(mb.conv(x=x, weight=lowering.file.part(part), name=f"{name}_{i}") for i, part in enumerate(matrix.parts))
    if node.role is not Role.LM_HEAD:
        return outputs
    outputs = tuple(held(output, scale) for output in outputs)
    return most_likely(outputs) if lowering.interface.argmax else logits(outputs)


def _pick(x: Var, picked: Var) -> Var:
    """The column of `x` `[1, D, 1, tokens]` that `picked` marks, `[1, D, 1, 1]`: exact, one product is with 1 and all others with 0.

    A matrix product, because the Neural Engine has no gather.
    """
    columns = mb.matmul(x=mb.transpose(x=x, perm=[0, 2, 1, 3]), y=picked)
    return mb.transpose(x=columns, perm=[0, 2, 1, 3])


def _rms_norm(lowering: NeuralEngineLowering, node: Node) -> Vars:
    spec = node.weights["weight"]
    weight = lowering.file.vector(spec, (1, spec.size, 1, 1))
    return (rms_norm(lowering.input(node), weight, node.attrs["eps"], axis=1),)


def _attention(lowering: NeuralEngineLowering, node: Node) -> Vars:
    return (lowering.attention(lowering.input(node, "qkv"), node),)


def _swiglu(lowering: NeuralEngineLowering, node: Node) -> Vars:
    gate, up = lowering.values[node.inputs["gate_up"]]
    return (mb.mul(x=mb.silu(x=gate), y=up),)


def _silu(lowering: NeuralEngineLowering, node: Node) -> Vars:
    return (mb.silu(x=lowering.input(node)),)


def _add(lowering: NeuralEngineLowering, node: Node) -> Vars:
    return (mb.add(x=lowering.input(node, "x"), y=lowering.input(node, "y")),)


LOWERINGS: Mapping[str, Callable[[NeuralEngineLowering, Node], Vars]] = {
    "embed": _embed,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "attention": _attention,
    "swiglu": _swiglu,
    "silu": _silu,
    "add": _add,
}
