"""Weights into `weight.bin` and into the graph: one tensor is read, quantized, written and forgotten before the next.

coremltools keeps every constant of a program as an array until it saves the package. Here a tensor goes to the file at once, and the graph
gets a stand-in: an array of the same shape and dtype without memory, and a `weight_id` by which the file offset is found again. Functions
that use the same tensor share its bytes. No arithmetic happens here: codes and scales are those of `QuantizedTensor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from coremltools import proto
from coremltools.converters.mil.backend.mil.helper import create_file_value_tensor, types_to_proto_primitive
from coremltools.converters.mil.backend.mil.load import MILProtoExporter
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.libmilstoragepython import _BlobStorageWriter as BlobStorageWriter
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.quantization.planned import PlannedWeights
from elmexport.quantization.quantize import PalettizedTensor, QuantizedTensor
from elmexport.quantization.schemes import Float
from elmexport.weights import WeightSpec
from targets.coreml.interface import MAX_DIM

WEIGHT_FILE = Path("weights", "weight.bin")  # beside the model specification

Var = Any  # coremltools' class carries no types


@dataclass(frozen=True)
class Blob:
    """A constant that lies in the weight file at `offset`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int


@dataclass(frozen=True)
class Part:
    """Rows of a weight matrix `[rows, in, 1, 1]`: fp16 values, or codes with `scales` `[rows, granules, 1, 1]`."""

    name: str
    values: Blob
    scales: Blob | None = None


@dataclass(frozen=True)
class Matrix:
    """A weight matrix in the file, cut along its rows. Its values times `factor` are the weight that was asked for."""

    parts: tuple[Part, ...]
    factor: float


class WeightFile:
    """Writes `weight.bin`; gives constants of the program under construction that refer to it."""

    def __init__(self, folder: Path, weights: PlannedWeights, advance: Callable[[int], None]) -> None:
        self.path = folder / WEIGHT_FILE
        self.path.parent.mkdir(parents=True)
        self.writer = BlobStorageWriter(str(self.path))
        self.blobs: dict[str, Blob] = {}
        self._weights, self._advance = weights, advance
        self._matrices: dict[tuple[str, float], Matrix] = {}

    def matrix(self, spec: WeightSpec, pieces: int, scale: float = 1.0) -> Matrix:
        """The weight `spec` times `scale` in `pieces` equal parts, each cut further where it exceeds `MAX_DIM` rows.

        A tensor asked for again (by the other function, or by a tied head) is the same bytes again.
        """
        key = (spec.name, scale)
        if key not in self._matrices:
            self._matrices[key] = self._write_matrix(spec, pieces, scale)
        return self._matrices[key]

    def vector(self, spec: WeightSpec, shape: tuple[int, ...]) -> Var:
        """A norm's weight as an fp16 constant of `shape`."""
        name = identifier(spec.name)
        if name not in self.blobs:
            tensor = self._weights.get(spec)
            assert not isinstance(tensor, QuantizedTensor | PalettizedTensor), f"{spec.name}: norms are not quantized"
            self._advance(spec.size)
            self._write(name, tensor.numpy().reshape(shape))
        return self._constant(self.blobs[name])

    def table(self, name: str, make: Callable[[], NDArray[Any]]) -> Var:
        """A constant that is no weight of the model, made when it is first asked for."""
        if name not in self.blobs:
            self._write(name, make())
        return self._constant(self.blobs[name])

    def part(self, part: Part) -> Var:
        """The rows of `part` `[rows, in, 1, 1]` as fp16, decompressed by Core ML where they are quantized."""
        if part.scales is None:
            return self._constant(part.values)
        data, scale = self._constant(part.values), self._constant(part.scales)
        return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=part.name)

    def close(self) -> None:
        """Finish the file: the writer flushes when it goes."""
        del self.writer

    def _write_matrix(self, spec: WeightSpec, pieces: int, scale: float) -> Matrix:
        weight, factor = self._read(spec, scale)
        name = identifier(spec.name)
        bounds = _cut(spec.shape[0], pieces)
        parts = []
        for i, (start, stop) in enumerate(bounds):
            label = name if len(bounds) == 1 else f"{name}_part{i}"
            rows = slice(start, stop)
            if isinstance(weight, QuantizedTensor):
                codes = weight.codes[rows].numpy()[:, :, None, None]
                scales = self._write(f"{label}_scales", weight.scales[rows].numpy()[:, :, None, None])
                parts.append(Part(label, self._write(f"{label}_codes", codes, four_bits=weight.scheme.width == 4), scales))
            else:
                parts.append(Part(label, self._write(label, weight[rows].numpy()[:, :, None, None])))
        self._advance(spec.size)
        return Matrix(tuple(parts), factor)

    def _read(self, spec: WeightSpec, scale: float) -> tuple[Any, float]:
        """The weight times `scale`, and 1; or, where fp16 scales would lose bits to it, the weight as it is, and `scale`."""
        if isinstance(self._weights.scheme(spec), Float):
            return self._weights.get(spec, scale), 1.0
        weight = self._weights.get(spec)
        assert isinstance(weight, QuantizedTensor)
        try:
            return weight.scaled(scale), 1.0
        except ElmExportError:
            return weight, scale

    def _write(self, name: str, array: NDArray[Any], *, four_bits: bool = False) -> Blob:
        flat = np.ascontiguousarray(array).reshape(-1)
        if four_bits:
            offset, dtype = self.writer.write_int4_data(flat), types.np_int4_dtype
        elif array.dtype == np.float16:
            offset, dtype = self.writer.write_fp16_data(flat.view(np.uint16)), array.dtype
        elif array.dtype == np.int8:
            offset, dtype = self.writer.write_int8_data(flat), array.dtype
        else:
            assert array.dtype == np.int32, f"{name}: {array.dtype} has no place in the weight file"
            offset, dtype = self.writer.write_int32_data(flat), array.dtype
        self.blobs[name] = Blob(name, array.shape, dtype, offset)
        return self.blobs[name]

    def _constant(self, blob: Blob) -> Var:
        stand_in = np.broadcast_to(np.zeros((), blob.dtype), blob.shape)
        constant = mb.const(val=stand_in, name=blob.name)
        constant.op.weight_id = blob.name
        return constant


class Exporter(MILProtoExporter):  # type: ignore[misc]
    """coremltools' translation of a program, with the weights already in the file."""

    def __init__(self, program: Any, file: WeightFile, specification_version: int) -> None:
        super().__init__(program, str(file.path.parent), specification_version)
        self.blob_writers[str(file.path)] = file.writer
        self._blobs = file.blobs

    def get_milproto_value(self, var: Var) -> Any:
        blob = self._blobs.get(var.op.weight_id or "")
        return super().get_milproto_value(var) if blob is None else _file_value(blob)


def _file_value(blob: Blob) -> proto.MIL_pb2.Value:
    element = types.numpy_type_to_builtin_type(blob.dtype)
    return create_file_value_tensor(f"@model_path/{WEIGHT_FILE.as_posix()}", blob.offset, blob.shape, types_to_proto_primitive(element))


def _cut(rows: int, pieces: int) -> list[tuple[int, int]]:
    """Bounds of `pieces` equal parts of `rows`, each in as few and as equal parts of at most `MAX_DIM` rows as possible."""
    size = rows // pieces
    count = -(-size // MAX_DIM)
    edges = [piece * size + i * size // count for piece in range(pieces) for i in range(count)]
    return list(zip(edges, [*edges[1:], rows], strict=True))


def identifier(name: str) -> str:
    """A name that MIL accepts."""
    return name.replace(".", "_")
