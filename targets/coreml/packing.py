"""Packing of weights into `weight.bin` and into the graph: one tensor is read, quantized, written and forgotten before the next.

coremltools keeps every constant of a program as an array until it saves the package. Here a tensor goes to the file at once, and the graph
gets a stand-in: an array of the same shape and dtype without memory, and a `weight_id` by which the file offset is found again. Functions
that use the same tensor share its bytes. No arithmetic happens here: codes, scales and tables are those of `IntegerTensor` and
`PalettizedTensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coremltools import proto
from coremltools.converters.mil.backend.mil.helper import create_file_value_tensor, types_to_proto_primitive
from coremltools.converters.mil.backend.mil.load import MILProtoExporter
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.libmilstoragepython import _BlobStorageWriter as BlobStorageWriter
from numpy.typing import NDArray
from torch import Tensor

from elmexport.quantization.codec import Quantized
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.lut_codec import PalettizedTensor
from elmexport.quantization.weight_source import WeightSource
from elmexport.weights import WeightSpec
from targets.coreml.interface import MAX_DIM

WEIGHT_FILE = Path("weights", "weight.bin")  # beside the model specification

Var = Any  # coremltools' class carries no types
Weight = Tensor | Quantized

# Codes of which several lie in a byte, by the name that the blob writer has for them.
_NARROW: Mapping[str, np.dtype[Any]] = {"int4": types.np_int4_dtype, "uint4": types.np_uint4_dtype, "uint6": types.np_uint6_dtype}


@dataclass(frozen=True)
class Blob:
    """A constant that lies in the weight file at `offset`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int


@dataclass(frozen=True)
class MatrixRows:
    """Rows of a weight matrix `[rows, in, 1, 1]` in the file.

    They are fp16 values, codes with `scales` `[rows, groups, 1, 1]`, or indices into `tables` `[groups, 1, 1, 1, entries, 1]`.
    """

    name: str
    values: Blob
    scales: Blob | None = None
    tables: Blob | None = None


@dataclass(frozen=True)
class Matrix:
    """A weight matrix in the file, cut along its rows. Its values times `factor` are the weight that was asked for."""

    parts: tuple[MatrixRows, ...]
    factor: float


class WeightFile:
    """Writer of `weight.bin`; gives constants of the program under construction that refer to it.

    Matrices are `[rows, in]` and ones up to `rank` axes, 4 for convolutions. One with more than `max_rows` rows is cut.
    """

    def __init__(
        self, folder: Path, weights: WeightSource, advance: Callable[[int], None], *, rank: int = 4, max_rows: int | None = MAX_DIM
    ) -> None:
        self._ones, self._max_rows = (1,) * (rank - 2), max_rows
        self.path = folder / WEIGHT_FILE
        self.path.parent.mkdir(parents=True)
        self.writer = BlobStorageWriter(str(self.path))
        self.blobs: dict[str, Blob] = {}
        self._weights, self._advance = weights, advance
        self._matrices: dict[tuple[str, float], Matrix] = {}

    def matrix(self, spec: WeightSpec, pieces: int, scale: float = 1.0) -> Matrix:
        """The weight `spec` times `scale` in `pieces` equal parts, each cut further where it exceeds `max_rows` rows.

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
            assert isinstance(tensor, Tensor), f"{spec.name}: norms are not quantized"
            self._advance(spec.size)
            self._write(name, tensor.numpy().reshape(shape))
        return self._constant(self.blobs[name])

    def table(self, name: str, make: Callable[[], NDArray[Any]]) -> Var:
        """A constant that is no weight of the model, made when it is first asked for."""
        if name not in self.blobs:
            self._write(name, make())
        return self._constant(self.blobs[name])

    def rows(self, part: MatrixRows) -> Var:
        """Give `part` as a table `[rows, in]`: the same bytes of the file in constants of fewer axes."""

        def view(blob: Blob | None) -> Blob | None:
            if blob is None:
                return None
            ones = len(self._ones)
            shape = (*blob.shape[:2], *blob.shape[2 + ones :])
            return self.blobs.setdefault(f"{blob.name}_rows", replace(blob, name=f"{blob.name}_rows", shape=shape))

        values = view(part.values)
        assert values is not None
        return self.part(MatrixRows(f"{part.name}_rows", values, view(part.scales), view(part.tables)))

    def part(self, part: MatrixRows) -> Var:
        """The rows of `part` `[rows, in, 1, 1]` as fp16, decompressed by Core ML where they are quantized."""
        values = self._constant(part.values)
        if part.scales is not None:
            return mb.constexpr_blockwise_shift_scale(data=values, scale=self._constant(part.scales), name=part.name)
        if part.tables is not None:
            return mb.constexpr_lut_to_dense(indices=values, lut=self._constant(part.tables), name=part.name)
        return values

    def close(self) -> None:
        """Finish the file: the writer flushes when it goes."""
        del self.writer

    def _write_matrix(self, spec: WeightSpec, pieces: int, scale: float) -> Matrix:
        scaled = self._weights.scaled(spec, scale)
        weight = scaled.weight
        name = identifier(spec.name)
        bounds = _cut(spec.shape[0], pieces, 1 if isinstance(weight, Tensor) else weight.scheme.row_group, self._max_rows or spec.shape[0])
        parts = []
        for i, (start, stop) in enumerate(bounds):
            label = name if len(bounds) == 1 else f"{name}_part{i}"
            parts.append(self._write_part(label, weight, slice(start, stop)))
        self._advance(spec.size)
        return Matrix(tuple(parts), scaled.rest)

    def _write_part(self, label: str, weight: Weight, rows: slice) -> MatrixRows:
        if isinstance(weight, IntegerTensor):
            scales = self._write(f"{label}_scales", self._matrix(weight.scales[rows]))
            codes = self._matrix(weight.codes[rows])
            return MatrixRows(label, self._write(f"{label}_codes", codes, f"int{weight.scheme.width}"), scales=scales)
        if isinstance(weight, PalettizedTensor):
            entries = _tables(weight, rows)
            tables = self._write(f"{label}_tables", entries.reshape(len(entries), 1, *self._ones, -1, 1))
            indices = self._matrix(weight.codes[rows])
            return MatrixRows(label, self._write(f"{label}_indices", indices, f"uint{weight.scheme.width}"), tables=tables)
        assert isinstance(weight, Tensor), f"{label}: `CoreMLTarget.refuses` {weight.scheme}"
        return MatrixRows(label, self._write(label, self._matrix(weight[rows])))

    def _matrix(self, values: Tensor) -> NDArray[Any]:
        return values.numpy().reshape(*values.shape, *self._ones)

    def _write(self, name: str, array: NDArray[Any], kind: str | None = None) -> Blob:
        """`kind` ("uint4") says which integers the bytes of `array` stand for, where they are not bytes."""
        kind = kind or array.dtype.name
        flat = np.ascontiguousarray(array).reshape(-1)
        if kind == "float16":
            offset = self.writer.write_fp16_data(flat.view(np.uint16))
        else:
            assert kind in _NARROW or kind in ("int8", "uint8", "int32"), f"{name}: {kind} has no place in the weight file"
            offset = getattr(self.writer, f"write_{kind}_data")(flat)
        self.blobs[name] = Blob(name, array.shape, _NARROW.get(kind, array.dtype), offset)
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


def _cut(rows: int, pieces: int, group: int = 1, most: int = MAX_DIM) -> list[tuple[int, int]]:
    """Bounds of `pieces` equal parts of `rows`, each in as few and as equal parts of at most `most` rows as possible.

    A part of a piece ends behind a whole number of groups of `group` rows, counted from the piece's start, unless a group exceeds `most`.
    """
    size = rows // pieces
    step = group if group <= most else 1
    steps = -(-size // step)
    count = -(-steps // (most // step))
    edges = [piece * size + i * steps // count * step for piece in range(pieces) for i in range(count)]
    return list(zip(edges, [*edges[1:], rows], strict=True))


def _tables(weight: PalettizedTensor, rows: slice) -> NDArray[np.float16]:
    """Tables `[groups, entries]` of some rows, for groups of equal size: smaller ones, tables repeated, where the rows cut through groups."""
    group = len(weight.codes) // len(weight.tables)
    first, last = rows.start // group, (rows.stop - 1) // group
    if first == last:
        return weight.tables[first : first + 1].numpy()
    size = math.gcd(group, rows.start, rows.stop)
    return weight.tables[torch.arange(rows.start, rows.stop, size) // group].numpy()


def identifier(name: str) -> str:
    """A name that MIL accepts."""
    return name.replace(".", "_")
