"""The weight file of a Core ML package ("MIL blob storage", version 2): a reader that maps it into memory and checks it.

The file is little-endian: a 64-byte header (count, version), then blobs at multiples of 64. A blob is 64 bytes of metadata (sentinel, type,
size in bytes, offset of the data, padding in bits) and its data elsewhere. Types below a byte are packed from the lowest bit of a byte up.
coremltools has a reader too; this one gives views instead of copies, and says what is wrong with a damaged file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError

_HEADER = struct.Struct("<II")
_METADATA = struct.Struct("<IIQQQ")
_METADATA_SIZE = 64
_SENTINEL = 0xDEADBEEF
_VERSION = 2


@dataclass(frozen=True)
class _Element:
    """Storage of an element type; `bits` below 8 are packed and give int8 or uint8."""

    code: int
    bits: int
    dtype: np.dtype[Any]


_ELEMENTS: Mapping[str, _Element] = {
    "float16": _Element(1, 16, np.dtype("<f2")),
    "float32": _Element(2, 32, np.dtype("<f4")),
    "uint8": _Element(3, 8, np.dtype("u1")),
    "int8": _Element(4, 8, np.dtype("i1")),
    "int16": _Element(6, 16, np.dtype("<i2")),
    "uint16": _Element(7, 16, np.dtype("<u2")),
    "int4": _Element(8, 4, np.dtype("i1")),
    "uint1": _Element(9, 1, np.dtype("u1")),
    "uint2": _Element(10, 2, np.dtype("u1")),
    "uint4": _Element(11, 4, np.dtype("u1")),
    "uint3": _Element(12, 3, np.dtype("u1")),
    "uint6": _Element(13, 6, np.dtype("u1")),
    "int32": _Element(14, 32, np.dtype("<i4")),
    "uint32": _Element(15, 32, np.dtype("<u4")),
}


class BlobFile:
    """A weight file, mapped into memory.

    Raises:
        ElmExportError: no such file, or not a weight file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            size = path.stat().st_size
            if size:
                with path.open("rb") as file:
                    # Copy on write: nothing is ever written, but torch takes only writable memory.
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._bytes: NDArray[np.uint8] = np.zeros(0, np.uint8) if self._map is None else np.frombuffer(self._map, np.uint8)
        except OSError as error:
            raise ElmExportError(
                f"{path}: cannot read the weight file ({error.strerror}); copy the package again or export it again"
            ) from None
        if size < _METADATA_SIZE:
            raise self._damaged(f"{size} bytes are no header")
        _, version = _HEADER.unpack(self._bytes[: _HEADER.size].tobytes())
        if version != _VERSION:
            raise self._damaged(f"storage version {version}, this reader knows {_VERSION}")

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Read the blob at `offset` as an array of `shape`: a view of the file, or unpacked int8 or uint8 for a type below a byte.

        Raises:
            ElmExportError: nothing of that type and size lies there.
        """
        element = _ELEMENTS[dtype]
        data = self._data(offset, dtype, shape)
        if element.bits < 8:
            return unpack(data, element.bits, prod(shape), signed=dtype.startswith("int")).reshape(shape)
        return data.view(element.dtype).reshape(shape)

    def release(self) -> None:
        """Take what was read out of this process's memory; arrays stay valid, and what is read again comes from the file."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def check(self, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        """Check that a blob of this type and shape lies at `offset`; `read` without reading.

        Raises:
            ElmExportError: as `read`.
        """
        self._data(offset, dtype, shape)

    def _data(self, offset: int, dtype: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        if dtype not in _ELEMENTS:
            raise ElmExportError(f"{self.path}: weights of type {dtype} are not supported; known: {', '.join(_ELEMENTS)}")
        element, total = _ELEMENTS[dtype], len(self._bytes)
        if offset + _METADATA_SIZE > total:
            raise self._damaged(f"it ends at byte {total}, a weight begins at {offset}")
        sentinel, code, size, start, _ = _METADATA.unpack(self._bytes[offset : offset + _METADATA.size].tobytes())
        if sentinel != _SENTINEL:
            raise self._damaged(f"no weight begins at byte {offset}")
        expected = -(-prod(shape) * element.bits // 8)
        if code != element.code or size != expected:
            raise self._damaged(f"the weight at byte {offset} is not {dtype} {list(shape)}")
        if start + size > total:
            raise self._damaged(f"it ends at byte {total}, the weight at {offset} reaches to {start + size}")
        return self._bytes[start : start + size]

    def _damaged(self, reason: str) -> ElmExportError:
        return ElmExportError(f"{self.path}: damaged weight file ({reason}); copy the package again or export it again")


_TAKEN = 1 << 18  # bytes unpacked at a time, so that their numbers as indices stay in the cache


def _unpacked_nibbles(packed: NDArray[np.uint8], signed: bool) -> NDArray[Any]:
    """Both halves of each byte, the low one first, out of a table of 256 pairs: several times as fast as shifts over the whole array."""
    byte = np.arange(256)
    halves = np.stack((byte & 15, byte >> 4), axis=1)
    pairs = ((halves ^ 8) - 8 if signed else halves).astype(np.int8 if signed else np.uint8).view(np.uint16).reshape(-1)
    out = np.empty(len(packed), np.uint16)
    for start in range(0, len(packed), _TAKEN):
        part = slice(start, start + _TAKEN)
        np.take(pairs, packed[part], out=out[part], mode="clip")
    return out.view(np.int8 if signed else np.uint8)


def unpack(packed: NDArray[np.uint8], bits: int, count: int, *, signed: bool = False) -> NDArray[Any]:
    """Unpack `count` integers of `bits` (1, 2, 3, 4 or 6) each from bytes filled from the lowest bit up; int8 if `signed`, else uint8."""
    if bits == 4:
        return _unpacked_nibbles(packed, signed)[:count]
    group = 1 if 8 % bits == 0 else 3  # bytes that hold a whole number of elements
    padded = np.zeros(-(-len(packed) // group) * group, np.uint8)
    padded[: len(packed)] = packed
    columns = padded.reshape(-1, group)
    word = columns[:, 0] if group == 1 else columns[:, 0] | columns[:, 1].astype(np.uint32) << 8 | columns[:, 2].astype(np.uint32) << 16
    mask = (1 << bits) - 1
    out = np.empty((len(word), group * 8 // bits), np.uint8)
    for i in range(out.shape[1]):
        out[:, i] = (word >> (i * bits)) & mask
    codes = out.reshape(-1)[:count]
    if not signed:
        return codes
    half = 1 << (bits - 1)
    return ((codes ^ half).astype(np.int8) - np.int8(half)).astype(np.int8)
