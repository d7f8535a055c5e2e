"""Reads a package with coremltools' own specification and weight-file readers, for tests; none of our code takes part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense
from coremltools.libmilstoragepython import _BlobStorageReader as BlobStorageReader
from numpy.typing import NDArray

MIL = ct.proto.MIL_pb2


class Package:
    def __init__(self, artifact: Path, name: str = "*.mlpackage") -> None:
        (self.path,) = artifact.glob(name)
        self.model = ct.models.MLModel(str(self.path), skip_model_load=True)
        self.spec = self.model.get_spec()
        self.weight_file = Path(self.model.weights_dir) / "weight.bin"
        self._reader = BlobStorageReader(str(self.weight_file))

    def operations(self, function: str) -> list[Any]:
        found = self.spec.mlProgram.functions[function]
        return list(found.block_specializations[found.opset].operations)

    def operation(self, function: str, name: str) -> Any:
        """The operation whose (first) output is called `name`."""
        (found,) = (op for op in self.operations(function) if op.outputs and op.outputs[0].name == name)
        return found

    def blobs(self, function: str) -> Iterator[Any]:
        """Every value of a function that lies in the weight file."""
        for op in self.operations(function):
            # Looking up an absent key in a protobuf map would add it.
            values = [op.attributes[key] for key in op.attributes] + [b.value for arg in op.inputs.values() for b in arg.arguments]
            for value in values:
                if value.HasField("blobFileValue"):
                    yield value

    def array(self, value: Any) -> NDArray[Any]:
        """A constant of the weight file; 4-bit codes as int8, indices as uint8."""
        readers = {
            MIL.FLOAT16: lambda offset: np.asarray(self._reader.read_fp16_data(offset)).view(np.float16),
            MIL.INT8: self._reader.read_int8_data,
            MIL.INT4: self._reader.read_int4_data,
            MIL.INT32: self._reader.read_int32_data,
            MIL.UINT4: self._reader.read_uint4_data,
            MIL.UINT6: self._reader.read_uint6_data,
            MIL.UINT8: self._reader.read_uint8_data,
        }
        return np.asarray(readers[value.type.tensorType.dataType](value.blobFileValue.offset)).reshape(shape(value.type))

    def weight(self, function: str, name: str) -> NDArray[np.float32]:
        """The matrix or norm called `name` (as in the checkpoint), its parts put together, dequantized."""
        label = name.replace(".", "_")
        names = [op.outputs[0].name for op in self.operations(function) if op.outputs]
        labels = (label, *(f"{label}_part{i}" for i in range(8)))
        parts = [part for part in labels if part in names] or [f"{part}_rows" for part in labels if f"{part}_rows" in names]
        return np.concatenate([self._part(self.operation(function, part)) for part in parts])

    def _part(self, op: Any) -> NDArray[np.float32]:
        if op.type == "const":
            values = self.array(op.attributes["val"]).astype(np.float32)
            return values.reshape(values.shape[:2]) if values.shape[0] > 1 else values.reshape(-1)
        if op.type == "constexpr_lut_to_dense":
            indices, tables = (self.array(op.inputs[key].arguments[0].value) for key in ("indices", "lut"))
            return constexpr_lut_to_dense.decompress(indices, tables, None).astype(np.float32).reshape(indices.shape[:2])
        assert op.type == "constexpr_blockwise_shift_scale"
        arrays = (self.array(op.inputs[key].arguments[0].value).astype(np.float32) for key in ("data", "scale"))
        codes, scales = (array.reshape(array.shape[:2]) for array in arrays)
        return codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


def shape(kind: Any) -> tuple[int, ...]:
    tensor = kind.stateType.wrappedType.tensorType if kind.HasField("stateType") else kind.tensorType
    return tuple(int(dimension.constant.size) for dimension in tensor.dimensions)
