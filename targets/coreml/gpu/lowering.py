"""Lowering of the op vocabulary to MIL in the form for GPUs: one function for any number of tokens.

Activations are fp16 `[1, tokens, channels]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, get_new_symbol, types

from elmexport.contracts.coreml_gpu import CAUSAL_MASK, INPUT_IDS, KEY_CACHE, LOGITS, VALUE_CACHE
from elmexport.graph.ir import Graph, Node
from elmexport.weights import Role
from targets.coreml.building import fresh_names, held, times
from targets.coreml.gpu.attention import FusedAttention
from targets.coreml.gpu.interface import input_ranges
from targets.coreml.head_range import LOGIT_SCALE
from targets.coreml.interface import cache_shape
from targets.coreml.norm import rms_norm
from targets.coreml.packing import MatrixRows, Var, WeightFile, identifier


def lower(graph: Graph, file: WeightFile) -> Function:
    """Lower `graph` to a function; see `elmexport.contracts.coreml_gpu` for its inputs, states and output."""
    cache = cache_shape(graph)
    shapes = {name: [low if low == high else get_new_symbol() for low, high in ranges] for name, ranges in input_ranges(graph).items()}
    inputs = {
        INPUT_IDS: mb.TensorSpec(shapes[INPUT_IDS], dtype=types.int32),
        CAUSAL_MASK: mb.TensorSpec(shapes[CAUSAL_MASK], dtype=types.fp16),
        KEY_CACHE: mb.StateTensorSpec(cache, dtype=types.fp16),
        VALUE_CACHE: mb.StateTensorSpec(cache, dtype=types.fp16),
    }
    with fresh_names(), Function(inputs, opset_version=ct.target.iOS18) as function:
        lowering = GpuLowering(graph, file, function.inputs)
        for node in graph.nodes:
            lowering.values[node.outputs[0]] = LOWERINGS[node.op](lowering, node)
        function.set_outputs([lowering.values[graph.result]])
    return function


class GpuLowering:
    """State that the lowerings of the function's nodes share. `values` holds activations."""

    def __init__(self, graph: Graph, file: WeightFile, inputs: Mapping[str, Var]) -> None:
        self.graph, self.file = graph, file
        self.ids = inputs[INPUT_IDS]
        self.attention = FusedAttention(graph, file, inputs)
        self.values: dict[str, Var] = {}
        self._constants: dict[str, Var] = {}

    def input(self, node: Node, argument: str = "x") -> Var:
        return self.values[node.inputs[argument]]

    def constant(self, part: MatrixRows) -> Var:
        """The weight `part` as a constant, the same one when asked again: a tied head and the embedding share it."""
        if part.name not in self._constants:
            self._constants[part.name] = self.file.part(part)
        return self._constants[part.name]


def _embed(lowering: GpuLowering, node: Node) -> Var:
    spec = node.weights["table"]
    tied = lowering.graph.dims.tied
    matrix = lowering.file.matrix(spec, 1, 1.0 if tied else node.weight_scale)
    rows = mb.gather(x=lowering.constant(*matrix.parts), indices=lowering.ids, axis=0)
    return times(rows, matrix.factor * node.weight_scale if tied else matrix.factor)


def _linear(lowering: GpuLowering, node: Node) -> Var:
    matrix = lowering.file.matrix(node.weights["weight"], 1, node.weight_scale)
    # A factor that the weight cannot take goes on the input, so that the product stays as small as it would be.
    scale = node.attrs.get(LOGIT_SCALE, 1.0)
    x = times(lowering.input(node), matrix.factor * scale)
    name = LOGITS if node.role is Role.LM_HEAD and scale == 1.0 else identifier(node.name)
    weight = lowering.constant(*matrix.parts)
    # Left out, each projection would get zeros of its own.
    bias = lowering.file.table(f"no_bias_{weight.shape[0]}", lambda: np.zeros(weight.shape[0], np.float16))
    y = mb.linear(x=x, weight=weight, bias=bias, name=name)
    return y if scale == 1.0 else held(y, scale, name=LOGITS)


def _rms_norm(lowering: GpuLowering, node: Node) -> Var:
    spec = node.weights["weight"]
    return rms_norm(lowering.input(node), lowering.file.vector(spec, (1, 1, spec.size)), node.attrs["eps"], axis=2)


def _attention(lowering: GpuLowering, node: Node) -> Var:
    return lowering.attention(lowering.input(node, "qkv"), node)


def _swiglu(lowering: GpuLowering, node: Node) -> Var:
    gate, up = mb.split(x=lowering.input(node, "gate_up"), num_splits=2, axis=2)
    return mb.mul(x=mb.silu(x=gate), y=up)


def _silu(lowering: GpuLowering, node: Node) -> Var:
    return mb.silu(x=lowering.input(node))


def _add(lowering: GpuLowering, node: Node) -> Var:
    return mb.add(x=lowering.input(node, "x"), y=lowering.input(node, "y"))


LOWERINGS: Mapping[str, Callable[[GpuLowering, Node], Var]] = {
    "embed": _embed,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "attention": _attention,
    "swiglu": _swiglu,
    "silu": _silu,
    "add": _add,
}
