"""The tensors of an ONNX model: its initializers, those of one quantized matrix taken together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.artifact import StoredTensor
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.weights import Role

if TYPE_CHECKING:
    import onnx

# What the lowering adds to the names of a matrix's initializers.
_CODES, _SCALES, _ZEROS, _TRANSPOSED = ".codes", ".scales", ".zeros", ".transposed"


def list_tensors(folder: Path, config: ModelConfig) -> Iterator[StoredTensor]:
    """Every initializer of the folder's `.onnx` files, in file order; a quantized matrix is one entry, scales included.

    Raises:
        ElmExportError: a file that onnx cannot make sense of.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    roles = {name: spec.role for spec in config.weights() for name in (spec.name, spec.group)}
    for path in sorted(folder.rglob("*.onnx")):
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except DecodeError as error:
            raise ElmExportError(f"{path} is not an ONNX file, or is damaged ({error}); export it again") from None
        yield from _of_graph(graph, roles)


def _of_graph(graph: onnx.GraphProto, roles: Mapping[str, Role]) -> Iterator[StoredTensor]:
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    blocks = {node.input[1]: {a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "MatMulNBits"}
    blocks |= {node.input[0]: {a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "GatherBlockQuantized"}
    for node in graph.node:
        if node.op_type == "QMoE":
            found = {a.name: a.i for a in node.attribute}
            for codes in (node.input[2], node.input[5]):
                blocks[codes] = {"bits": found["expert_weight_bits"], "block_size": found["block_size"]}
    for name, tensor in initializers.items():
        if name.endswith(_CODES):
            weight = name.removesuffix(_CODES)
            parts = [initializers[weight + suffix] for suffix in (_CODES, _SCALES, _ZEROS) if weight + suffix in initializers]
            if name in blocks:
                scheme, shape, turned = *_contrib(tensor, blocks[name]), False
            else:
                scheme, shape, turned = _standard(tensor, initializers[weight + _SCALES])
            scheme += (" with zero points" if len(parts) == 3 else "") + (", transposed" if turned else "")
            yield StoredTensor(weight, roles.get(weight), scheme, shape, sum(map(_bytes, parts)))
        elif name.endswith(_TRANSPOSED):
            weight = name.removesuffix(_TRANSPOSED)
            yield StoredTensor(weight, roles.get(weight), f"{_dtype(tensor)} transposed", tuple(reversed(tensor.dims)), _bytes(tensor))
        elif _matrix_of(name) + _CODES not in initializers:
            yield StoredTensor(name, roles.get(name), _dtype(tensor), tuple(tensor.dims), _bytes(tensor))


def _contrib(codes: onnx.TensorProto, attributes: Mapping[str, int]) -> tuple[str, tuple[int, ...]]:
    """Scheme and logical shape of codes of onnxruntime's own operators.

    They are `[out, blocks, bytes of a block]`, of stacked experts `[experts, out, bytes of a row]`: there gate and up are one tensor, in rows
    that take turns.
    """
    block, bits = attributes["block_size"], attributes["bits"]
    scheme = f"int{bits} in blocks of {block}"
    if codes.dims[2] * 8 // bits == block:
        return scheme, (codes.dims[0], codes.dims[1] * block)
    return scheme, (codes.dims[0], codes.dims[1], codes.dims[2] * 8 // bits)


def _standard(codes: onnx.TensorProto, scales: onnx.TensorProto) -> tuple[str, tuple[int, ...], bool]:
    """Scheme and logical shape of codes for DequantizeLinear, `[out, in]`, or, transposed, `[in, out]` with blocks along the first axis."""
    axis = 1 if codes.dims[0] == scales.dims[0] else 0
    scheme = f"{_dtype(codes)} in blocks of {codes.dims[axis] // scales.dims[axis]}"
    return scheme, tuple(codes.dims) if axis else tuple(reversed(codes.dims)), not axis


def _matrix_of(name: str) -> str:
    """The matrix to whose quantized form an initializer called `name` would belong."""
    return name.removesuffix(_SCALES).removesuffix(_ZEROS)


def _dtype(tensor: onnx.TensorProto) -> str:
    from onnx.helper import tensor_dtype_to_np_dtype

    return str(tensor_dtype_to_np_dtype(tensor.data_type))


def _bytes(tensor: onnx.TensorProto) -> int:
    import onnx
    from onnx.helper import tensor_dtype_to_np_dtype

    count = prod(tensor.dims)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
