"""From the op vocabulary to ONNX: the fast form, with onnxruntime's `com.microsoft` operators.

Inputs `input_ids` and `attention_mask` (int64) and `past_key_values.N.key|value`, outputs `logits` (float32) and
`present.N.key|value`. `attention_mask` is `[batch_size, total_sequence_length]`, ones over the tokens in the cache and those now fed.
The cache is `[batch_size, kv_heads_N, length, head_dim]`: past and present bound to one buffer make it static, fed back it grows.
Not covered: the portable form without contrib operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from elmexport.graph.ir import Node
from elmexport.graph.ops import rope_angles
from elmexport.quantization.quantize import QuantizedTensor
from elmexport.target import ExportJob
from elmexport.weights import WeightSpec
from targets.onnx.builder import MICROSOFT, GraphBuilder
from targets.onnx.packing import pack_codes

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
CONTEXT_KEY = "elmexport.context"  # metadata of the model: tokens that its rotary tables reach
_ACCURACY_LEVEL = 4  # MatMulNBits multiplies in int8; without it, 8-bit weights take a path about 100 times slower

_DTYPES = {"fp32": (ir.DataType.FLOAT, np.float32), "fp16": (ir.DataType.FLOAT16, np.float16)}


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix in the file: codes uint8 `[out, blocks, bytes of a block]` and scales `[out, blocks]`."""

    codes: ir.Value
    scales: ir.Value
    bits: int
    size: int  # values of a block

    @property
    def attributes(self) -> dict[str, int]:
        return {"bits": self.bits, "block_size": self.size}


class Lowering:
    """Lowers one graph, node by node; each weight is read, packed and written when its node comes."""

    def __init__(self, job: ExportJob, builder: GraphBuilder) -> None:
        self.job, self.graph, self.config, self.builder = job, job.graph, job.config, builder
        self.dtype, self.numpy_dtype = _DTYPES[job.recipe.activations.dtype]
        self.values: dict[str, ir.Value] = {}
        self.matrices: dict[str, ir.Value | Blocks] = {}  # as written, for the tied head to share
        self.uses = Counter(name for node in self.graph.nodes for name in node.inputs.values())
        self.norm_of = {node.inputs["x"]: node for node in self.graph.nodes if node.op == "rms_norm"}

    def run(self) -> ir.Model:
        self._inputs()
        for node in self.graph.nodes:
            _LOWERINGS[node.op](self, node)
        self._outputs()
        return self.builder.model(self.job.name, {CONTEXT_KEY: str(self.graph.context)})

    # Inputs and outputs

    def _inputs(self) -> None:
        build, d = self.builder, self.config.head_dim
        self.values["ids"] = build.input("input_ids", ir.DataType.INT64, (BATCH, SEQUENCE))
        mask = build.input("attention_mask", ir.DataType.INT64, (BATCH, TOTAL))
        for i, layer in enumerate(self.config.layers):
            for kind, short in (("key", "k"), ("value", "v")):
                shape = (BATCH, layer.kv_heads, PAST, d)
                self.values[f"{short}_cache.{i}"] = build.input(f"past_key_values.{i}.{kind}", self.dtype, shape)
        # GroupQueryAttention wants int32: the index of each sequence's last token, and the length of the longest.
        one = build.constant("one", np.array([1], np.int64))
        lengths = build.op("ReduceSum", "attention_mask.lengths", mask, one, keepdims=0)
        last = build.op("Sub", "attention_mask.last", lengths, one)
        self.last = build.op("Cast", "seqlens_k", last, to=ir.DataType.INT32)
        shape = build.op("Shape", "attention_mask.shape", mask)
        total = build.op("Gather", "attention_mask.total", shape, build.constant("axis_1", np.array(1, np.int64)), axis=0)
        self.total = build.op("Cast", "total_sequence_length", total, to=ir.DataType.INT32)
        angles = rope_angles(torch.arange(self.graph.context), d, float(self.config.rope_freq_constant), torch.float64)
        self.cos, self.sin = (
            build.weight(name, table[:, : d // 2].numpy().astype(self.numpy_dtype))
            for name, table in zip(("cos_cache", "sin_cache"), angles, strict=True)
        )

    def _outputs(self) -> None:
        logits = self.values[self.graph.logits]
        if self.dtype != ir.DataType.FLOAT:
            logits = self.builder.op("Cast", "logits.cast", logits, to=ir.DataType.FLOAT)
        self.builder.output(logits, "logits", ir.DataType.FLOAT, (BATCH, SEQUENCE, self.config.vocab_size))
        for i, layer in enumerate(self.config.layers):
            shape = (BATCH, layer.kv_heads, TOTAL, self.config.head_dim)
            self.builder.output(self.values[self.graph.present_keys[i]], f"present.{i}.key", self.dtype, shape)
            self.builder.output(self.values[self.graph.present_values[i]], f"present.{i}.value", self.dtype, shape)

    # Weights

    def _matrix(self, spec: WeightSpec, scale: float = 1.0, *, transpose: bool = False) -> ir.Value | Blocks:
        """A matrix, written at its first use; floats as `[in, out]` with `transpose`, the layout of MatMul."""
        if spec.name not in self.matrices:
            weight = self.job.weights.get(spec, scale)
            if isinstance(weight, QuantizedTensor):
                codes = self.builder.weight(f"{spec.name}.codes", pack_codes(weight))
                scales = self.builder.weight(f"{spec.name}.scales", self._floats(weight.scales))
                self.matrices[spec.name] = Blocks(codes, scales, weight.scheme.width, spec.shape[1] // weight.scales.shape[1])
            elif transpose:
                self.matrices[spec.name] = self.builder.weight(f"{spec.name}.transposed", self._floats(weight.t()))
            else:
                self.matrices[spec.name] = self.builder.weight(spec.name, self._floats(weight))
            self.job.advance(spec.size)
        return self.matrices[spec.name]

    def _vector(self, spec: WeightSpec) -> ir.Value:
        weight = self.job.weights.get(spec)
        assert isinstance(weight, torch.Tensor), f"{spec.name}: norms are not quantized"
        self.job.advance(spec.size)
        return self.builder.weight(spec.name, self._floats(weight))

    def _floats(self, tensor: torch.Tensor) -> NDArray[Any]:
        """In the dtype of the activations, which is at least as wide as that of any weight or scale (an exact conversion)."""
        return tensor.numpy().astype(self.numpy_dtype, copy=False)

    # Ops

    def embed(self, node: Node) -> None:
        build, ids = self.builder, self.values[node.inputs["ids"]]
        table = self._matrix(node.weights["table"])
        out = self._gather_blocks(node, ids, table) if isinstance(table, Blocks) else build.op("Gather", node.name, table, ids, axis=0)
        if node.weight_scale != 1.0:  # not in the table: the tied head wants it as it is
            factor = build.constant("residual_scale", np.array(node.weight_scale, self.numpy_dtype))
            out = build.op("Mul", f"{node.name}.scaled", out, factor)
        self.values[node.outputs[0]] = out

    def _gather_blocks(self, node: Node, ids: ir.Value, table: Blocks) -> ir.Value:
        """Rows of a matrix in MatMulNBits' layout: the op takes the three-dimensional codes as they lie, the scales lack an axis."""
        build, (vocabulary, dim) = self.builder, node.weights["table"].shape
        axis = build.constant("scales_shape", np.array([vocabulary, dim // table.size, 1], np.int64))
        scales = build.op("Reshape", f"{node.name}.scales", table.scales, axis)
        attributes = {"gather_axis": 0, "quantize_axis": 2, **table.attributes}
        blocks = build.op("GatherBlockQuantized", f"{node.name}.blocks", table.codes, ids, scales, domain=MICROSOFT, **attributes)
        return build.op("Reshape", node.name, blocks, build.constant("embedding_shape", np.array([0, 0, dim], np.int64)))

    def linear(self, node: Node) -> None:
        build, spec, x = self.builder, node.weights["weight"], self.values[node.inputs["x"]]
        tied = spec.name in self.matrices
        matrix = self._matrix(spec, node.weight_scale, transpose=True)
        if isinstance(matrix, Blocks):
            attributes = {"N": spec.shape[0], "K": spec.shape[1], "accuracy_level": _ACCURACY_LEVEL, **matrix.attributes}
            out = build.op("MatMulNBits", node.name, x, matrix.codes, matrix.scales, domain=MICROSOFT, **attributes)
        else:
            if tied:  # it lies as the embedding needs it; engines fold the transposition when they load
                matrix = build.op("Transpose", f"{node.name}.transposed", matrix, perm=[1, 0])
            out = build.op("MatMul", node.name, x, matrix)
        self.values[node.outputs[0]] = out

    def rms_norm(self, node: Node) -> None:
        if node.outputs[0] not in self.values:  # else `add` has emitted it
            self.values[node.outputs[0]] = self._normalize(
                node.name, self.values[node.inputs["x"]], node.weights["weight"], node.attrs["eps"]
            )

    def _normalize(self, name: str, x: ir.Value, weight: WeightSpec, eps: float) -> ir.Value:
        """RMS norm over the last axis. onnxruntime's kernels sum in float32 for fp16 inputs too."""
        return self.builder.op("SimplifiedLayerNormalization", name, x, self._vector(weight), axis=-1, epsilon=eps, stash_type=1)

    def add(self, node: Node) -> None:
        x, y = self.values[node.inputs["x"]], self.values[node.inputs["y"]]
        norm = self.norm_of.get(node.outputs[0])
        if norm is None:
            self.values[node.outputs[0]] = self.builder.op("Add", node.name, x, y)
            return
        # Outputs of the fused op: the norm, two that only training needs, and the sum, left out where nothing else reads it.
        outputs = ("",) if self.uses[node.outputs[0]] == 1 else ("", None, None, ".sum")
        inputs = (x, y, self._vector(norm.weights["weight"]))
        eps = {"epsilon": norm.attrs["eps"]}
        values = self.builder.node("SkipSimplifiedLayerNormalization", norm.name, inputs, eps, domain=MICROSOFT, outputs=outputs)
        self.values[norm.outputs[0]] = values[0]
        self.values[node.outputs[0]] = values[-1]

    def attention(self, node: Node) -> None:
        build, d = self.builder, self.config.head_dim
        query_heads, kv_heads = node.attrs["query_heads"], node.attrs["kv_heads"]
        qkv: list[ir.Value | None] = [self.values[node.inputs["qkv"]], None, None]
        if "q_norm" in node.weights or "k_norm" in node.weights:  # the norms need heads; without them the op takes the three in one
            sizes = build.constant(f"split.{query_heads}.{kv_heads}", np.array([query_heads * d, kv_heads * d, kv_heads * d], np.int64))
            query, key, value = build.node("Split", f"{node.name}.split", (qkv[0], sizes), {"axis": -1}, outputs=(".q", ".k", ".v"))
            query = self._head_norm(node, "q_norm", query, query_heads)
            key = self._head_norm(node, "k_norm", key, kv_heads)
            qkv = [query, key, value]
        cache = (self.values[node.inputs["k_cache"]], self.values[node.inputs["v_cache"]])
        values = build.node(
            "GroupQueryAttention",
            node.name,
            (*qkv, *cache, self.last, self.total, self.cos, self.sin),
            {"num_heads": query_heads, "kv_num_heads": kv_heads, "do_rotary": 1, "rotary_interleaved": 0},
            domain=MICROSOFT,
            outputs=("", ".k_cache", ".v_cache"),
        )
        self.values.update(zip(node.outputs, values, strict=True))

    def _head_norm(self, node: Node, which: str, x: ir.Value, heads: int) -> ir.Value:
        """RMS norm of each head of `x` `[batch, tokens, heads * d]`, where the model has that norm."""
        if which not in node.weights:
            return x
        build, d = self.builder, self.config.head_dim
        name = f"{node.name}.{which}"
        split = build.op("Reshape", f"{name}.heads", x, build.constant("heads_shape", np.array([0, 0, -1, d], np.int64)))
        normed = self._normalize(name, split, node.weights[which], node.attrs["eps"])
        return build.op("Reshape", f"{name}.flat", normed, build.constant(f"flat_shape.{heads}", np.array([0, 0, heads * d], np.int64)))

    def swiglu(self, node: Node) -> None:
        halves = self.builder.node(
            "Split", f"{node.name}.split", (self.values[node.inputs["gate_up"]],), {"axis": -1, "num_outputs": 2}, outputs=(".gate", ".up")
        )
        self.values[node.outputs[0]] = self.builder.op("Mul", node.name, self._silu(f"{node.name}.silu", halves[0]), halves[1])

    def silu(self, node: Node) -> None:
        self.values[node.outputs[0]] = self._silu(node.name, self.values[node.inputs["x"]])

    def _silu(self, name: str, x: ir.Value) -> ir.Value:
        """`x * sigmoid(x)`, which onnxruntime fuses into one kernel."""
        return self.builder.op("Mul", name, x, self.builder.op("Sigmoid", f"{name}.sigmoid", x))


_LOWERINGS: Mapping[str, Callable[[Lowering, Node], None]] = {
    "embed": Lowering.embed,
    "rms_norm": Lowering.rms_norm,
    "linear": Lowering.linear,
    "attention": Lowering.attention,
    "swiglu": Lowering.swiglu,
    "silu": Lowering.silu,
    "add": Lowering.add,
}
