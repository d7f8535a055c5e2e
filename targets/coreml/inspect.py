"""The tensors of a Core ML package, read from its specification: constants in the weight file, and what decompresses them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from elmexport.artifact import StoredTensor
from elmexport.mil.program import BlobFileValue, Operation, load_program
from elmexport.models.base import ModelConfig
from elmexport.weights import Role

# What is added to a tensor's name where its rows are cut into parts, where it is seen as a table, and where it is a constant.
_SUFFIX = re.compile(r"(_part\d+)?(_rows)?(_const)?$")


def list_tensors(folder: Path, config: ModelConfig) -> Iterator[StoredTensor]:
    """Every tensor in the weight files of the folder's `.mlpackage`s, in the order of use.

    A tensor that several functions share is listed once; a compressed one is one entry, scales included; one that was cut into parts is an
    entry for each part. What several packages hold, as a table that is the embedding of the first and the head of the last, is listed for
    each.

    Raises:
        ElmExportError: not a package, or a damaged one.
    """
    roles = {spec.name.replace(".", "_"): spec.role for spec in config.weights()}  # as `packing.identifier` names them
    for package in sorted(folder.glob("*.mlpackage")):
        seen: set[tuple[int, ...]] = set()
        for function in load_program(package).functions.values():
            for operation in function.operations:
                blobs = {key: argument for key, (argument, *_) in operation.arguments.items() if isinstance(argument, BlobFileValue)}
                stored = tuple(blob.offset for blob in blobs.values())
                if stored and stored not in seen:
                    seen.add(stored)
                    yield _tensor(operation, blobs, roles)


def _tensor(operation: Operation, blobs: dict[str, BlobFileValue], roles: Mapping[str, Role]) -> StoredTensor:
    name, kind = operation.outputs[0]
    size = sum(prod(blob.shape) * int(re.sub(r"\D", "", blob.dtype)) // 8 for blob in blobs.values())
    shape = tuple(axis for axis in kind.shape if axis is not None)
    return StoredTensor(_SUFFIX.sub(r"\1", name), roles.get(_SUFFIX.sub("", name)), _scheme(operation.type, kind.dtype, blobs), shape, size)


def _scheme(operation: str, dtype: str, blobs: dict[str, BlobFileValue]) -> str:
    if operation == "constexpr_blockwise_shift_scale":
        data, scales = blobs["data"], blobs["scale"]
        block = data.shape[1] // scales.shape[1]  # of [out, in, …]
        return f"{data.dtype} {'per output channel' if scales.shape[1] == 1 else f'in blocks of {block}'}"
    if operation == "constexpr_lut_to_dense":
        indices, tables = blobs["indices"], blobs["lut"]
        groups = tables.shape[0]
        which = "one table" if groups == 1 else f"a table for every {indices.shape[0] // groups} output channels"
        return f"{indices.dtype} indices, {which}"
    return dtype if operation == "const" else operation.removeprefix("constexpr_").replace("_", " ")
