"""Builder of ONNX graphs over onnx-ir: named nodes, and initializers whose bytes go straight into one external data file.

Nothing here knows of models. Small constants stay inside the `.onnx` file, as readers' shape inference needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

OPSET = 21  # the lowest that every op used here needs, so that older engines take the file
IR_VERSION = 10
MICROSOFT = "com.microsoft"
_PAGE = 4096  # large tensors start on one, as memory mapping likes it
_LINE = 64  # bytes of a cache line, on which small ones start
_LARGE = 16 * _PAGE


class ExternalData:
    """Writer of external data, one tensor after the other into `path`; `ExternalTensor`s that refer to it name the file only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, name: str, array: NDArray[Any], dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
        """Write `array` (contiguous) at the next aligned offset, to be read as `dtype` and `shape`."""
        self._file.write(bytes(-self._file.tell() % (_PAGE if array.nbytes >= _LARGE else _LINE)))
        offset = self._file.tell()
        self._file.write(array.data)
        return ir.ExternalTensor(self.path.name, offset, array.nbytes, dtype, shape=ir.Shape(shape), name=name)


class GraphBuilder:
    """Builder of an ONNX graph: collects nodes, inputs, outputs and initializers in order; `model` puts them together."""

    def __init__(self, data: ExternalData) -> None:
        self._data = data
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.val(name, dtype, shape)
        self._inputs.append(value)
        return value

    def optional_input(self, name: str, default: NDArray[Any]) -> ir.Value:
        """An input that callers may leave out: an initializer that is listed among the inputs."""
        value = self._initializer(name, ir.Tensor(default, name=name))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make `value` an output of the model called `name`."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def weight(self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None, shape: Sequence[int] | None = None) -> ir.Value:
        """An initializer in the external data file; `array` is not kept. `dtype` and `shape` where codes are packed several to a byte."""
        dtype = dtype or ir.DataType.from_numpy(array.dtype)
        return self._initializer(name, self._data.append(name, np.ascontiguousarray(array), dtype, shape or array.shape))

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initializer inside the `.onnx` file; equal names mean equal constants."""
        if name in self._initializers:
            return self._initializers[name]
        return self._initializer(name, ir.Tensor(array, name=name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        assert name not in self._initializers, f"{name} is written twice"
        value = ir.val(name, tensor.dtype, tensor.shape, const_value=tensor)
        self._initializers[name] = value
        return value

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: Sequence[str | None] = ("",),
    ) -> list[ir.Value]:
        """Append a node; its values are called `<name><suffix>` for each suffix in `outputs` (None: an output that is left out)."""
        values = [ir.val("" if suffix is None else f"{name}{suffix}") for suffix in outputs]
        self._nodes.append(ir.node(op, inputs, attributes, domain=domain, outputs=values, name=name))
        return values

    def op(self, op: str, name: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node with one output."""
        return self.node(op, name, inputs, attributes, domain=domain)[0]

    def model(self, name: str, metadata: Mapping[str, str], opset: int, ir_version: int) -> ir.Model:
        domains = {node.domain for node in self._nodes}
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": opset} | ({MICROSOFT: 1} if MICROSOFT in domains else {}),
            name=name,
        )
        return ir.Model(graph, ir_version=ir_version, producer_name="elmexport", metadata_props=dict(metadata))


def save(model: ir.Model, path: Path) -> None:
    """Write `model` in protobuf's deterministic order, so that equal models are equal files."""
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
