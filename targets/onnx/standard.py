"""Lowering of the op vocabulary to ONNX: the portable form, operators of opset 24 alone.

The interface is that of the fast form, with caches of fixed length: `past_key_values.N.*` and `present.N.*` are
`[batch_size, kv_heads_N, context, head_dim]`, and TensorScatter writes the new tokens in their place. Weights of 4 or 8 bits are
blockwise DequantizeLinear, `[in, out]` where engines fuse them with the product, `[out, in]` in a table that a tied head shares.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from elmexport.graph.ir import Node
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.weights import WeightSpec
from targets.onnx.lowering import Lowering, PackedMatrix
from targets.onnx.packing import pack_flat
from targets.onnx.rows import BATCH

OPSET, IR_VERSION = 24, 11
_DTYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}  # of symmetric codes


class StandardLowering(Lowering):
    """Lowers one graph, node by node; each weight is read, packed and written when its node comes."""

    opset, ir_version = OPSET, IR_VERSION
    fused_experts = False
    _dequantized: ir.Value | None = None

    def _cache_shape(self, layer: int, length: str) -> tuple[int | str, ...]:
        return (BATCH, self.dims.layers[layer].kv_heads, self.graph.context, self.dims.head_dim)

    # Weights

    def _blocks(self, spec: WeightSpec, weight: IntegerTensor, *, transpose: bool) -> PackedMatrix:
        bits, zeros = weight.scheme.width, weight.zeros
        dtype = _DTYPES[bits] if zeros is None else ir.DataType.UINT4

        def turned(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.t() if transpose else tensor

        def packed(kind: str, values: torch.Tensor) -> ir.Value:
            return self.builder.weight(f"{spec.name}.{kind}", pack_flat(values, bits), dtype, tuple(values.shape))

        codes = packed("codes", turned(weight.codes))
        scales = self.builder.weight(f"{spec.name}.scales", self.floats(turned(weight.scales)))
        size = spec.shape[1] // weight.scales.shape[1]
        return PackedMatrix(codes, scales, bits, size, None if zeros is None else packed("zeros", turned(zeros)))

    # Ops

    def _gather_blocks(self, node: Node, ids: ir.Value, table: PackedMatrix) -> ir.Value:
        build = self.builder
        if table.bits == 4:  # Gather takes no 4-bit codes; a tied head needs the whole table anyway
            return build.op("Gather", node.name, self._table(table), ids, axis=0)
        codes = build.op("Gather", f"{node.name}.codes", table.codes, ids, axis=0)
        scales = build.op("Gather", f"{node.name}.scales", table.scales, ids, axis=0)
        return build.op("DequantizeLinear", node.name, codes, scales, axis=2, block_size=table.size)

    def _multiply(self, node: Node, spec: WeightSpec, x: ir.Value, matrix: PackedMatrix, *, tied: bool) -> ir.Value:
        build = self.builder
        if tied:
            weight = build.op("Transpose", f"{node.name}.transposed", self._table(matrix), perm=[1, 0])
        else:
            inputs = (matrix.codes, matrix.scales, *(() if matrix.zeros is None else (matrix.zeros,)))
            weight = build.op("DequantizeLinear", f"{node.name}.dequantized", *inputs, axis=0, block_size=matrix.size)
        return build.op("MatMul", node.name, x, weight)

    def _table(self, table: PackedMatrix) -> ir.Value:
        """The embedding `[vocabulary, dim]`, dequantized once for all that read it."""
        if self._dequantized is None:
            build = self.builder
            self._dequantized = build.op("DequantizeLinear", "table.dequantized", table.codes, table.scales, axis=1, block_size=table.size)
        return self._dequantized

    def _normalize(self, name: str, x: ir.Value, weight: WeightSpec, eps: float) -> ir.Value:
        return self.builder.op("RMSNormalization", name, x, self._vector(weight), axis=-1, epsilon=eps, stash_type=1)

    def add(self, node: Node) -> None:
        self.values[node.outputs[0]] = self.builder.op("Add", node.name, *(self.values[node.inputs[which]] for which in ("x", "y")))

    def attention(self, node: Node) -> None:
        build, d = self.builder, self.dims.head_dim
        heads = {"q": node.attrs["query_heads"], "k": node.attrs["kv_heads"], "v": node.attrs["kv_heads"]}
        split = self.separate.get(node.inputs["qkv"])
        if split is None:
            sizes = build.constant(f"split.{heads['q']}.{heads['k']}", np.array([count * d for count in heads.values()], np.int64))
            split = build.node(
                "Split", f"{node.name}.split", (self.values[node.inputs["qkv"]], sizes), {"axis": -1}, outputs=(".q", ".k", ".v")
            )
        shape = build.constant("heads_shape", np.array([0, 0, -1, d], np.int64))
        parts = {}
        for which, part in zip(heads, split, strict=True):
            name = f"{node.name}.{which}"
            part = build.op("Reshape", f"{name}_heads", part, shape)
            if f"{which}_norm" in node.weights:
                part = self._normalize(f"{name}_norm", part, node.weights[f"{which}_norm"], node.attrs["eps"])
            part = build.op("Transpose", f"{name}_first", part, perm=[0, 2, 1, 3])
            if which != "v":
                part = build.op("RotaryEmbedding", f"{name}_rotated", part, self.cos, self.sin, self.rows.positions)
            parts[which] = part
        caches = [
            build.op(
                "TensorScatter",
                f"{node.name}.{which}_cache",
                self.values[node.inputs[f"{which}_cache"]],
                parts[which],
                self.rows.start,
                axis=2,
            )
            for which in ("k", "v")
        ]
        # Where each row's tokens end, padding on the right included, is where the causal triangle ends.
        out = build.op("Attention", f"{node.name}.heads", parts["q"], *caches, None, None, None, self.rows.end, is_causal=1)
        out = build.op("Transpose", f"{node.name}.last", out, perm=[0, 2, 1, 3])
        flat = build.constant(f"flat_shape.{heads['q']}", np.array([0, 0, heads["q"] * d], np.int64))
        result = build.op("Reshape", node.name, out, flat)
        self.values.update(zip(node.outputs, (result, *caches), strict=True))
