"""Writer of GGUF files: metadata first, then the tensors, each read, quantized, packed and written before the next one is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.quantization.ggml import GgmlType
from elmexport.target import ExportJob
from elmexport.weights import WeightSpec
from targets.gguf import ggml
from targets.gguf.families import Architecture, architecture
from targets.gguf.imatrix import ImportanceMatrix
from targets.gguf.lowering import Entry, lower
from targets.gguf.metadata import describe, file_name, is_float, write_metadata
from targets.gguf.packing import TYPES, pack

ALIGNMENT = 32  # of every tensor's first byte


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: `shape` `[out, bytes of a row]`, or a stack of such, in the type `stored`."""

    name: str
    entry: Entry
    stored: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes, without padding."""
        return int(np.prod(self.shape))

    @property
    def padded(self) -> int:
        return GGUFWriter.ggml_pad(self.size, ALIGNMENT)


def write_gguf(job: ExportJob, folder: Path, imatrix: ImportanceMatrix | None, chat_template: str | None, limit: int | None) -> list[Path]:
    """Write the model into `folder` and return the paths, in order: one file, or several with at most `limit` bytes of tensors each.

    Raises:
        ElmExportError: weights or a tokenizer that the file cannot hold.
        MissingDependencyError: a type that needs ggml, which is not installed.
    """
    in_experts = sum(spec.size for spec in job.config.weights() if spec.role.is_expert)
    facts = describe(job.name, job.config.parameter_count, job.graph.dims.layers[0].experts, in_experts)
    kind = architecture(job.config)
    tensors = _tensors(job, kind)
    shards = _split(tensors, limit)
    stem = file_name(facts, job.recipe)
    names = [stem] if len(shards) == 1 else [f"{stem}-{i + 1:05d}-of-{len(shards):05d}" for i in range(len(shards))]
    paths = [folder / f"{name}.gguf" for name in names]
    places: dict[str, tuple[IO[bytes], int]] = {}
    writers = []
    try:
        for i, (path, shard) in enumerate(zip(paths, shards, strict=True)):
            writer = GGUFWriter(path, kind.name)
            writers.append(writer)
            if i == 0:
                write_metadata(writer, facts, job, imatrix, chat_template)
            else:
                writer.kv_data[0].clear()  # the first file alone describes the model
            if len(shards) > 1:
                writer.add_uint16("split.no", i)
                writer.add_int32("split.tensors.count", len(tensors))
                writer.add_uint16("split.count", len(shards))
            places |= _write_head(writer, shard)
        for entry in _entries(tensors):
            _write_entry(job, entry, imatrix, places)
    finally:
        for writer in writers:
            writer.close()
    return paths


def _tensors(job: ExportJob, kind: Architecture) -> list[_Tensor]:
    """Every tensor, in the order of llama.cpp's files.

    The converter goes by the checkpoint's names, and stacks experts when it has met the last one; the quantizer goes by the layer and its own
    names.
    """
    tensors = []
    for entry in lower(job.graph, kind):
        (scheme,) = {job.weights.scheme(spec) for spec in entry.specs}
        stored = GGMLQuantizationType[TYPES[scheme]]
        shape = quant_shape_to_byte_shape(entry.tensor_shape, stored)
        tensors += [_Tensor(name, entry, stored, shape) for name in entry.names]
    if is_float(job.recipe):
        return sorted(tensors, key=lambda tensor: max(spec.name for spec in tensor.entry.specs))
    return sorted(tensors, key=lambda tensor: (-1 if tensor.entry.spec.layer is None else tensor.entry.spec.layer, tensor.name))


def _entries(tensors: Sequence[_Tensor]) -> list[Entry]:
    """The weights in the order of their first tensors: files are written nearly from front to back."""
    return list(dict.fromkeys(tensor.entry for tensor in tensors))


def _split(tensors: Sequence[_Tensor], limit: int | None) -> list[list[_Tensor]]:
    """The tensors of each file, as `llama-gguf-split` deals them out. A tensor larger than the limit has a file of its own."""
    shards: list[list[_Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        used += tensor.padded
        if limit is not None and used > limit and shards[-1]:
            shards.append([])
            used = tensor.padded
        shards[-1].append(tensor)
    return shards


def _write_head(writer: GGUFWriter, tensors: Sequence[_Tensor]) -> dict[str, tuple[IO[bytes], int]]:
    """Write all but the tensors' data, for which the file is made long enough; by tensor, the file and where its data go."""
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.uint8), tensor.size, raw_dtype=tensor.stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    position = GGUFWriter.ggml_pad(file.tell(), ALIGNMENT)
    places = {}
    for tensor in tensors:
        places[tensor.name] = file, position
        position += tensor.padded
    file.truncate(position)  # so the padding is zeros
    return places


def _write_entry(job: ExportJob, entry: Entry, imatrix: ImportanceMatrix | None, places: dict[str, tuple[IO[bytes], int]]) -> None:
    """Read, quantize and write the weights of one entry, one after the other."""
    for spec in entry.specs:
        for name, data in _packed(job, spec, entry, imatrix):
            file, position = places[name]
            file.seek(position + (spec.expert or 0) * data.nbytes)
            file.write(np.ascontiguousarray(data).data)
        job.advance(spec.size)


def _packed(job: ExportJob, spec: WeightSpec, entry: Entry, imatrix: ImportanceMatrix | None) -> list[tuple[str, NDArray[np.uint8]]]:
    """Name and bytes `[out, bytes of a row]` of what `spec` gives to each tensor of `entry`."""
    scheme = job.weights.scheme(spec)
    if not isinstance(scheme, GgmlType):
        parts = np.split(pack(job.weights.get(spec)), len(entry.names))
        return list(zip(entry.names, parts, strict=True))
    weight = job.weights.numbers(spec)
    try:
        return [
            (name, ggml.quantize(part, scheme, None if imatrix is None else imatrix.of(name, spec.expert, spec.shape[-1])))
            for name, part in zip(entry.names, torch.split(weight, entry.part_shape[0]), strict=True)
        ]
    except ElmExportError as error:
        raise error.of(spec.name) from None
