"""Lowering of the op vocabulary to ONNX: the fast form, with onnxruntime's `com.microsoft` operators.

Inputs `input_ids` and `attention_mask` (int64) and `past_key_values.N.key|value`, outputs `logits` (float32) and
`present.N.key|value`. `attention_mask` is `[batch_size, total_sequence_length]`, ones over the tokens in the cache and those now fed.
The cache is `[batch_size, kv_heads_N, length, head_dim]`: past and present bound to one buffer make it static, fed back it grows.

GroupQueryAttention takes a row's tokens from the left, without gaps. Callers pad on the left: the graph rolls each row to the left when it
comes in, and the hidden states back before the head, which costs a gather of ids and one of the states that the head reads.

`logits_to_keep` is an initializer with a default that may be overridden like an input: 1 (the default) computes the head for the last token
of every row, k for the last k, 0 for every column. Callers that do not know of it never pay for the head on a prompt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from elmexport.contracts.onnx import ATTENTION_MASK, CONTEXT_METADATA, INPUT_IDS, LOGITS, past, present
from elmexport.graph.ir import Node
from elmexport.graph.ops import rope_angles
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.target import ExportJob
from elmexport.weights import Role, WeightSpec
from targets.onnx.builder import IR_VERSION, MICROSOFT, OPSET, GraphBuilder
from targets.onnx.experts import lower_experts
from targets.onnx.packing import pack_codes, pack_zeros
from targets.onnx.rows import BATCH, SEQUENCE, TOTAL, Rows

PAST = "past_sequence_length"
_ACCURACY_LEVEL = 4  # MatMulNBits multiplies in int8; without it, 8-bit weights take a path about 100 times slower

_DTYPES = {"fp32": (ir.DataType.FLOAT, np.float32), "fp16": (ir.DataType.FLOAT16, np.float16)}


@dataclass(frozen=True)
class PackedMatrix:
    """Quantized matrix in the file.

    Codes uint8 `[out, blocks, bytes of a block]`, scales `[out, blocks]`, and where the codes are asymmetric zero points uint8
    `[out, bytes of a row]`.
    """

    codes: ir.Value
    scales: ir.Value
    bits: int
    size: int  # values of a block
    zeros: ir.Value | None = None
    factor: float = 1.0  # what the values have still to be multiplied by, where fp16 scales could not take it

    @property
    def attributes(self) -> dict[str, int]:
        return {"bits": self.bits, "block_size": self.size}


class Lowering:
    """Lowers one graph, node by node; each weight is read, packed and written when its node comes."""

    opset, ir_version = OPSET, IR_VERSION
    fused_experts = True  # whether mixtures of experts may become onnxruntime's own operator

    def __init__(self, job: ExportJob, builder: GraphBuilder) -> None:
        self.job, self.graph, self.dims, self.builder = job, job.graph, job.graph.dims, builder
        self.dtype, self.numpy_dtype = _DTYPES[job.recipe.activations.dtype]
        self.values: dict[str, ir.Value] = {}
        self.separate: dict[str, list[ir.Value]] = {}  # queries, keys and values that the attention takes as they are, by the joined value
        self.matrices: dict[str, ir.Value | PackedMatrix] = {}  # as written, for the tied head to share
        self.uses = Counter(name for node in self.graph.nodes for name in node.inputs.values())
        self.norm_of = {node.inputs["x"]: node for node in self.graph.nodes if node.op == "rms_norm"}

    def run(self) -> ir.Model:
        self._inputs()
        for node in self.graph.nodes:
            getattr(self, node.op)(node)
        self._outputs()
        return self.builder.model(self.job.name, {CONTEXT_METADATA: str(self.graph.context)}, self.opset, self.ir_version)

    # Inputs and outputs

    def _inputs(self) -> None:
        build, d = self.builder, self.dims.head_dim
        ids = build.input(INPUT_IDS, ir.DataType.INT64, (BATCH, SEQUENCE))
        mask = build.input(ATTENTION_MASK, ir.DataType.INT64, (BATCH, TOTAL))
        for i in range(len(self.dims.layers)):
            self.values[f"k_cache.{i}"] = build.input(past(i, "key"), self.dtype, self._cache_shape(i, PAST))
            self.values[f"v_cache.{i}"] = build.input(past(i, "value"), self.dtype, self._cache_shape(i, PAST))
        self.rows = Rows(build, ids, mask)
        self.values["ids"] = self.rows.ids
        angles = rope_angles(torch.arange(self.graph.context), d, self.graph.rope_theta, torch.float64)
        self.cos, self.sin = (
            build.weight(name, table[:, : d // 2].numpy().astype(self.numpy_dtype))
            for name, table in zip(("cos_cache", "sin_cache"), angles, strict=True)
        )

    def _outputs(self) -> None:
        logits = self.values[self.graph.result]
        if self.dtype != ir.DataType.FLOAT:
            logits = self.builder.op("Cast", "logits.cast", logits, to=ir.DataType.FLOAT)
        self.builder.output(logits, LOGITS, ir.DataType.FLOAT, (BATCH, 1, self.dims.vocab_size))
        for i in range(len(self.dims.layers)):
            shape = self._cache_shape(i, TOTAL)
            self.builder.output(self.values[self.graph.present_keys[i]], present(i, "key"), self.dtype, shape)
            self.builder.output(self.values[self.graph.present_values[i]], present(i, "value"), self.dtype, shape)

    def _cache_shape(self, layer: int, length: str) -> tuple[int | str, ...]:
        return (BATCH, self.dims.layers[layer].kv_heads, length, self.dims.head_dim)

    # Weights

    def _matrix(self, spec: WeightSpec, scale: float = 1.0, *, transpose: bool = False) -> ir.Value | PackedMatrix:
        """A matrix, written at its first use; floats as `[in, out]` with `transpose`, the layout of MatMul."""
        if spec.name not in self.matrices:
            scaled = self.job.weights.scaled(spec, scale)
            weight = scaled.weight
            if not isinstance(weight, torch.Tensor):
                assert isinstance(weight, IntegerTensor), f"{spec.name}: `OnnxTarget.refuses` {weight.scheme}"
                self.matrices[spec.name] = replace(self._blocks(spec, weight, transpose=transpose), factor=scaled.rest)
            elif transpose:
                self.matrices[spec.name] = self.builder.weight(f"{spec.name}.transposed", self.floats(weight.t()))
            else:
                self.matrices[spec.name] = self.builder.weight(spec.name, self.floats(weight))
            self.job.advance(spec.size)
        return self.matrices[spec.name]

    def _blocks(self, spec: WeightSpec, weight: IntegerTensor, *, transpose: bool) -> PackedMatrix:
        codes = self.builder.weight(f"{spec.name}.codes", pack_codes(weight))
        scales = self.builder.weight(f"{spec.name}.scales", self.floats(weight.scales))
        zeros = None if weight.zeros is None else self.builder.weight(f"{spec.name}.zeros", pack_zeros(weight.zeros))
        return PackedMatrix(codes, scales, weight.scheme.width, spec.shape[1] // weight.scales.shape[1], zeros)

    def _vector(self, spec: WeightSpec) -> ir.Value:
        weight = self.job.weights.get(spec)
        assert isinstance(weight, torch.Tensor), f"{spec.name}: norms are not quantized"
        self.job.advance(spec.size)
        return self.builder.weight(spec.name, self.floats(weight))

    def floats(self, tensor: torch.Tensor) -> NDArray[Any]:
        """In the dtype of the activations, which is at least as wide as that of any weight or scale (an exact conversion)."""
        return tensor.numpy().astype(self.numpy_dtype, copy=False)

    # Ops

    def embed(self, node: Node) -> None:
        build, ids = self.builder, self.values[node.inputs["ids"]]
        table = self._matrix(node.weights["table"])
        out = (
            self._gather_blocks(node, ids, table) if isinstance(table, PackedMatrix) else build.op("Gather", node.name, table, ids, axis=0)
        )
        # Not in the table: the tied head wants it as it is.
        self.values[node.outputs[0]] = self.times(f"{node.name}.scaled", out, node.weight_scale)

    def times(self, name: str, x: ir.Value, factor: float) -> ir.Value:
        """`x` times the residual stream's scale, or times 1: then no node."""
        if factor == 1.0:
            return x
        return self.builder.op("Mul", name, x, self.builder.constant("residual_scale", np.array(factor, self.numpy_dtype)))

    def _gather_blocks(self, node: Node, ids: ir.Value, table: PackedMatrix) -> ir.Value:
        """Rows of a matrix in MatMulNBits' layout: the op takes the three-dimensional codes as they lie, the scales lack an axis."""
        build, (vocabulary, dim) = self.builder, node.weights["table"].shape
        axis = build.constant("scales_shape", np.array([vocabulary, dim // table.size, 1], np.int64))
        scales = build.op("Reshape", f"{node.name}.scales", table.scales, axis)
        # onnxruntime's kernel makes zeros of ids beyond the table, in silence; Gather refuses them.
        vocabulary_ids = build.weight("vocabulary_ids", np.arange(vocabulary, dtype=np.int32))
        ids = build.op("Gather", f"{node.name}.ids", vocabulary_ids, ids, axis=0)
        attributes = {"gather_axis": 0, "quantize_axis": 2, **table.attributes}
        blocks = build.op("GatherBlockQuantized", f"{node.name}.blocks", table.codes, ids, scales, domain=MICROSOFT, **attributes)
        return build.op("Reshape", node.name, blocks, build.constant("embedding_shape", np.array([0, 0, dim], np.int64)))

    def linear(self, node: Node) -> None:
        x = self.values[node.inputs["x"]]
        if node.role is Role.LM_HEAD:
            x = self.rows.kept(x)
        self.values[node.outputs[0]] = self.project(node, node.weights["weight"], x)

    def project(self, node: Node, spec: WeightSpec, x: ir.Value) -> ir.Value:
        """The product of `x` `[…, in]` with the matrix of `spec`, times the scale of `node`, whose name it gets."""
        tied = node.role is Role.LM_HEAD and self.dims.tied  # the table has been written, for the embedding
        matrix = self._matrix(spec, node.weight_scale, transpose=True)
        if isinstance(matrix, PackedMatrix):
            # A factor that the weight cannot take goes on the input, so that the product stays as small as it would be.
            return self._multiply(node, spec, self.times(f"{node.name}.scaled_input", x, matrix.factor), matrix, tied=tied)
        if tied:  # it lies as the embedding needs it; engines fold the transposition when they load
            matrix = self.builder.op("Transpose", f"{node.name}.transposed", matrix, perm=[1, 0])
        return self.builder.op("MatMul", node.name, x, matrix)

    def _multiply(self, node: Node, spec: WeightSpec, x: ir.Value, matrix: PackedMatrix, *, tied: bool) -> ir.Value:
        attributes = {"N": spec.shape[0], "K": spec.shape[1], "accuracy_level": _ACCURACY_LEVEL, **matrix.attributes}
        inputs = (x, matrix.codes, matrix.scales, *(() if matrix.zeros is None else (matrix.zeros,)))
        return self.builder.op("MatMulNBits", node.name, *inputs, domain=MICROSOFT, **attributes)

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

    def join_qkv(self, node: Node) -> None:
        self.separate[node.outputs[0]] = [self.values[node.inputs[which]] for which in ("query", "key", "value")]

    def moe(self, node: Node) -> None:
        self.values[node.outputs[0]] = lower_experts(self, node, fused=self.fused_experts)

    def attention(self, node: Node) -> None:
        build, d = self.builder, self.dims.head_dim
        query_heads, kv_heads = node.attrs["query_heads"], node.attrs["kv_heads"]
        separate = self.separate.get(node.inputs["qkv"])
        qkv: list[ir.Value | None] = [self.values[node.inputs["qkv"]], None, None] if separate is None else [*separate]
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
            (*qkv, *cache, self.rows.last, self.rows.total, self.cos, self.sin),
            {"num_heads": query_heads, "kv_num_heads": kv_heads, "do_rotary": 1, "rotary_interleaved": 0},
            domain=MICROSOFT,
            outputs=("", ".k_cache", ".v_cache"),
        )
        self.values.update(zip(node.outputs, values, strict=True))

    def _head_norm(self, node: Node, which: str, x: ir.Value, heads: int) -> ir.Value:
        """RMS norm of each head of `x` `[batch, tokens, heads * d]`, where the model has that norm."""
        if which not in node.weights:
            return x
        build, d = self.builder, self.dims.head_dim
        name = f"{node.name}.{which}"
        split = build.op("Reshape", f"{name}.heads", x, build.constant("heads_shape", np.array([0, 0, -1, d], np.int64)))
        normed = self._normalize(name, split, node.weights[which], node.attrs["eps"])
        return build.op("Reshape", f"{name}.flat", normed, build.constant(f"flat_shape.{heads}", np.array([0, 0, heads * d], np.int64)))

    def swiglu(self, node: Node) -> None:
        halves = self.builder.node(
            "Split", f"{node.name}.split", (self.values[node.inputs["gate_up"]],), {"axis": -1, "num_outputs": 2}, outputs=(".gate", ".up")
        )
        self.values[node.outputs[0]] = self.builder.op("Mul", node.name, self.silu_of(f"{node.name}.silu", halves[0]), halves[1])

    def silu(self, node: Node) -> None:
        self.values[node.outputs[0]] = self.silu_of(node.name, self.values[node.inputs["x"]])

    def silu_of(self, name: str, x: ir.Value) -> ir.Value:
        """`x * sigmoid(x)`, which onnxruntime fuses into one kernel."""
        return self.builder.op("Mul", name, x, self.builder.op("Sigmoid", f"{name}.sigmoid", x))
