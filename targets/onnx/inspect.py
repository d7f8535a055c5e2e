"""The tensors of an ONNX model: its initializers, those of one quantized matrix taken together."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.errors import ElmExportError
from elmexport.inspection import StoredTensor, role_of

if TYPE_CHECKING:
    import onnx

# What the lowering adds to the names of a matrix's initializers.
_CODES, _SCALES, _TRANSPOSED = ".codes", ".scales", ".transposed"


def list_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Every initializer of the folder's `.onnx` files, in file order; a quantized matrix is one entry, scales included.

    Raises:
        ElmExportError: a file that onnx cannot make sense of.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    for path in sorted(folder.rglob("*.onnx")):
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except DecodeError as error:
            raise ElmExportError(f"{path} is not an ONNX file, or is damaged ({error}); export it again") from None
        yield from _of_graph(graph)


def _of_graph(graph: onnx.GraphProto) -> Iterator[StoredTensor]:
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    attributes = {name: {a.name: a.i for a in node.attribute} for node in graph.node for name in node.input if name.endswith(_CODES)}
    for name, tensor in initializers.items():
        if name.endswith(_CODES):
            weight = name.removesuffix(_CODES)
            bits, block = attributes[name]["bits"], attributes[name]["block_size"]
            size = _bytes(tensor) + _bytes(initializers[weight + _SCALES])
            shape = (tensor.dims[0], tensor.dims[1] * block)  # stored [out, blocks, bytes of a block]
            yield StoredTensor(weight, role_of(weight), f"int{bits} in blocks of {block}", shape, size)
        elif name.endswith(_TRANSPOSED):
            weight = name.removesuffix(_TRANSPOSED)
            yield StoredTensor(weight, role_of(weight), f"{_dtype(tensor)} transposed", tuple(reversed(tensor.dims)), _bytes(tensor))
        elif name.removesuffix(_SCALES) + _CODES not in initializers:
            yield StoredTensor(name, role_of(name), _dtype(tensor), tuple(tensor.dims), _bytes(tensor))


def _dtype(tensor: onnx.TensorProto) -> str:
    from onnx.helper import tensor_dtype_to_np_dtype

    return str(tensor_dtype_to_np_dtype(tensor.data_type))


def _bytes(tensor: onnx.TensorProto) -> int:
    from onnx.helper import tensor_dtype_to_np_dtype

    return prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
