"""Lowering of mixtures of experts to ONNX.

Experts in integers that `com.microsoft.QMoE` takes become one node, which computes each token's experts only. Its routing weights come in by
an input of their own: on CPUs the operator renormalizes what it computes itself, whatever `normalize_routing_weights` says (onnxruntime 1.31).
All other experts become a few nodes each, of standard operators, over the tokens that go to them: a token costs its own experts here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from elmexport.graph.ir import Node
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.schemes import Integer, PerBlock
from elmexport.weights import WeightSpec
from targets.onnx.builder import MICROSOFT
from targets.onnx.packing import pack_codes, pack_zeros

if TYPE_CHECKING:
    from targets.onnx.lowering import Lowering


def lower_experts(lowering: Lowering, node: Node, *, fused: bool) -> ir.Value:
    """Emit a `moe` node; `fused` allows onnxruntime's own operator."""
    build, x = lowering.builder, lowering.values[node.inputs["x"]]
    flat = build.constant("rows_shape", np.array([-1, lowering.dims.model_dim], np.int64))
    rows = build.op("Reshape", f"{node.name}.rows", x, flat)
    width = build.constant(f"experts_shape.{node.experts}", np.array([-1, node.experts], np.int64))
    logits = build.op("Reshape", f"{node.name}.logits", lowering.values[node.inputs["logits"]], width)
    # In float32 whatever the activations are, as the model computes them.
    wide = logits if lowering.dtype == ir.DataType.FLOAT else build.op("Cast", f"{node.name}.wide", logits, to=ir.DataType.FLOAT)
    probabilities = build.op("Softmax", f"{node.name}.probabilities", wide, axis=-1)
    scheme = _common_scheme(lowering, node)
    if fused and scheme is not None:
        out = _fused(lowering, node, rows, logits, probabilities, scheme)
    else:
        out = _one_by_one(lowering, node, rows, probabilities)
    return build.op("Reshape", node.name, out, build.op("Shape", f"{node.name}.shape", x))


def _common_scheme(lowering: Lowering, node: Node) -> Integer | None:
    """The scheme of all matrices, where it is one, of integers: the kernel for CPUs takes no two widths."""
    first, *others = {lowering.job.weights.scheme(spec) for spec in node.weights.values()}
    return first if isinstance(first, Integer) and not others else None


def _fused(lowering: Lowering, node: Node, rows: ir.Value, logits: ir.Value, probabilities: ir.Value, scheme: Integer) -> ir.Value:
    build = lowering.builder
    assert isinstance(scheme.granularity, PerBlock), f"QMoE takes blocks, not codes {scheme.granularity}"
    gate_up = _stack(lowering, node, ("gate", "up"))
    down = _stack(lowering, node, ("down",))
    attributes: dict[str, Any] = {
        "k": node.attrs["active"],
        "activation_type": "swiglu",
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "swiglu_fusion": 1,  # rows of gate and up in turn
        "expert_weight_bits": scheme.width,
        "block_size": scheme.granularity.size,
    }
    # No accuracy_level: onnxruntime before 1.31 refuses a file with it, the one inside transformers.js 4.3 too.
    # What the sum is multiplied by goes on the weights, which take any power of two exactly.
    weights = probabilities
    if lowering.dtype != ir.DataType.FLOAT:
        weights = build.op("Cast", f"{node.name}.weights", weights, to=lowering.dtype)
    weights = lowering.times(f"{node.name}.weights.scaled", weights, node.weight_scale)
    inputs = (rows, logits, *gate_up[:2], None, *down[:2], None, None, None, None, gate_up[2], down[2], None, weights)
    return build.op("QMoE", f"{node.name}.experts", *inputs, domain=MICROSOFT, **attributes)


def _stack(lowering: Lowering, node: Node, parts: Sequence[str]) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes uint8 `[experts, rows, bytes]`, scales `[experts, rows, blocks]` and zero points of all experts, rows of `parts` in turn."""
    stacks: list[NDArray[Any]] = []
    for expert in range(node.experts):
        specs = [node.weights[f"{part}.{expert}"] for part in parts]
        packed = [_packed(lowering, spec) for spec in specs]
        for number, arrays in enumerate(zip(*packed, strict=True)):
            rows = np.stack(arrays, axis=1).reshape(-1, arrays[0].shape[1])
            if expert == 0:
                stacks.append(np.empty((node.experts, *rows.shape), rows.dtype))
            stacks[number][expert] = rows
        lowering.job.advance(sum(spec.size for spec in specs))
    name = node.weights[f"{parts[0]}.0"].group
    values = [lowering.builder.weight(f"{name}.{kind}", stack) for kind, stack in zip(("codes", "scales", "zeros"), stacks, strict=False)]
    return values[0], values[1], values[2] if len(values) == 3 else None


def _packed(lowering: Lowering, spec: WeightSpec) -> list[NDArray[Any]]:
    """Codes and scales of one matrix, and zero points where it has some, each `[out, …]`."""
    weight = lowering.job.weights.get(spec)
    assert isinstance(weight, IntegerTensor), f"{spec.name}: not in integers"
    codes = pack_codes(weight)
    arrays = [codes.reshape(len(codes), -1), lowering.floats(weight.scales)]
    return arrays if weight.zeros is None else [*arrays, pack_zeros(weight.zeros)]


def _one_by_one(lowering: Lowering, node: Node, rows: ir.Value, probabilities: ir.Value) -> ir.Value:
    """The sum over the experts `[rows, D]`: each reads the rows that go to it and adds its result to theirs, in float32."""
    build, name, narrow = lowering.builder, node.name, lowering.dtype != ir.DataType.FLOAT
    active = build.constant(f"active.{node.attrs['active']}", np.array([node.attrs["active"]], np.int64))
    weights, chosen = build.node("TopK", f"{name}.chosen", (probabilities, active), {"axis": -1}, outputs=(".weights", ".experts"))
    nothing = build.op("ConstantOfShape", f"{name}.nothing", build.op("Shape", f"{name}.routes", probabilities))
    routes = build.op("ScatterElements", f"{name}.routing", nothing, chosen, weights, axis=-1)
    by_expert = build.op("Transpose", f"{name}.by_expert", routes, perm=[1, 0])
    first, last = (build.constant(label, np.array([axis], np.int64)) for label, axis in (("axis_0", 0), ("axis_last", -1)))
    out = build.op("ConstantOfShape", f"{name}.zeros", build.op("Shape", f"{name}.rows.shape", rows))
    for expert in range(node.experts):
        place = f"{name}.{expert}"
        number = build.constant(f"number.{expert}", np.array(expert, np.int64))
        route = build.op("Gather", f"{place}.route", by_expert, number, axis=0)
        tokens = build.op("Squeeze", f"{place}.tokens", build.op("NonZero", f"{place}.nonzero", route), first)
        x = build.op("Gather", f"{place}.input", rows, tokens, axis=0)
        gate, up = (_project(lowering, node, part, expert, x) for part in ("gate", "up"))
        hidden = build.op("Mul", f"{place}.hidden", lowering.silu_of(f"{place}.silu", gate), up)
        result = _project(lowering, node, "down", expert, hidden)
        if narrow:
            result = build.op("Cast", f"{place}.wide", result, to=ir.DataType.FLOAT)
        weight = build.op("Gather", f"{place}.weight", route, tokens, axis=0)
        result = build.op("Mul", f"{place}.weighted", result, build.op("Unsqueeze", f"{place}.column", weight, last))
        index = build.op("Unsqueeze", f"{place}.index", tokens, last)
        out = build.op("ScatterND", f"{place}.sum", out, index, result, reduction="add")
    return build.op("Cast", f"{name}.narrow", out, to=lowering.dtype) if narrow else out


def _project(lowering: Lowering, node: Node, part: str, expert: int, x: ir.Value) -> ir.Value:
    """One projection of one expert; the last one carries the scale of the residual stream."""
    spec = node.weights[f"{part}.{expert}"]
    scale = node.weight_scale if part == "down" else 1.0
    return lowering.project(replace(node, name=f"{node.name}.{expert}.{part}", role=spec.role, weight_scale=scale), spec, x)
