"""Zip archives of `torch.save`, checked before torch maps them.

torch itself looks neither at sizes nor at checksums of what it maps.

Nothing is unpickled here: opcodes are read.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elmexport.errors import ElmExportError

_AGAIN = "download it again"
_CHUNK = 1 << 22
_LOCAL_HEADER = struct.Struct("<26x2H")  # the lengths of the record's name and of its extra field end it
_LARGEST_VALUE = 10**8  # parts of a value when every reference to another is written out; a model has some thousands
_WIDTHS = {
    **{f"{name}Storage": 1 for name in ("Bool", "Char", "Byte", "Untyped")},
    **{f"{name}Storage": 2 for name in ("Half", "BFloat16", "Short")},
    **{f"{name}Storage": 4 for name in ("Float", "Int")},
    **{f"{name}Storage": 8 for name in ("Double", "Long", "ComplexFloat")},
    "ComplexDoubleStorage": 16,
}  # bytes of an element, by the class that a file names


class _Entry(NamedTuple):
    """A value on a pickle's stack: how many parts it has when every reference is written out, and itself where it is plain."""

    weight: int
    value: Any


_MARK = _Entry(0, "mark")


def check_archive(path: Path) -> None:
    """Check that every record of the archive `path` is stored as it is, and has the size that its tensor says. Reads no tensor.

    Raises:
        ElmExportError: compressed, encrypted or doubled records, a record of another size, a pickle that no model needs, or a file that cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            odd = next((record for record in records if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1), None)
            if odd is not None:
                raise ElmExportError(f"{path}: its record {odd.filename} is compressed or encrypted, which torch.save never does; {_AGAIN}")
            sizes = {record.filename: record.file_size for record in records}
            if len(sizes) < len(records) or any(record.file_size != record.compress_size for record in records):
                raise ElmExportError(f"{path} is corrupt (it lists a record twice, or with two sizes); {_AGAIN}")
        for record in records:
            folder, _, rest = record.filename.partition("/")
            if rest == "data.pkl":
                keys = {key.removeprefix(f"{folder}/data/"): size for key, size in sizes.items()}
                _check_storages(path, _content(path, record), keys)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, RuntimeError) as error:
        raise ElmExportError(f"{path} is truncated or corrupt ({error}); {_AGAIN}") from None
    except OSError as error:
        raise ElmExportError(f"{path} cannot be read ({error.strerror or error}); check the file and its permissions") from None


def check_content(path: Path) -> None:
    """Compare the content of every record of the archive `path` with its checksum: reads all of it.

    Raises:
        ElmExportError: one differs, or the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC:  # zero: torch.save was told to compute none
                    with archive.open(record) as content:
                        while content.read(_CHUNK):
                            pass
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError) as error:  # ValueError: names that are no UTF-8
        raise ElmExportError(f"{path} is truncated or corrupt ({error}); {_AGAIN}") from None
    except OSError as error:
        raise ElmExportError(f"{path} cannot be read ({error.strerror or error}); check the file and its permissions") from None


def _content(path: Path, record: zipfile.ZipInfo) -> bytes:
    """The bytes of a stored record, whatever its checksum: it may have none."""
    with path.open("rb") as file:
        file.seek(record.header_offset)
        name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        file.seek(name + extra, 1)
        return file.read(record.file_size)


def _check_storages(path: Path, pickle: bytes, sizes: Mapping[str, int]) -> None:
    """Compare the storages that `pickle` names with `sizes`, in bytes, of the records by key.

    Raises:
        ElmExportError: one is missing or has another size.
        ValueError: not a pickle, or one whose values would take forever to look at.
    """
    for storage in _storages(pickle):
        match storage:
            case ("storage", str(kind), str(key), _, int(count)) if (width := _WIDTHS.get(kind.rpartition(" ")[2])) is not None:
                if sizes.get(key) != count * width:
                    found = f"has {sizes[key]} bytes" if key in sizes else "is missing"
                    raise ElmExportError(
                        f"{path} is truncated or corrupt (record {key} {found}, its tensor takes {count * width}); {_AGAIN}"
                    )


def _storages(pickle: bytes) -> list[Any]:
    """What `pickle` says of each storage, by following its opcodes: the stack holds each value's weight, and the value where it is a plain one.

    Raises:
        ValueError: see `_check_storages`.
    """
    stack: list[_Entry] = []
    memo: dict[int, _Entry] = {}
    found = []
    try:
        for code, argument, _ in pickletools.genops(pickle):
            name = code.name
            if name == "MARK":
                stack.append(_MARK)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else int(str(argument))] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(str(argument))])
            else:
                taken = _take(stack, code.stack_before)
                values = [entry.value for entry in taken]
                weight = 1 + sum(entry.weight for entry in taken)
                if weight > _LARGEST_VALUE:
                    raise ValueError("values nested in each other without end")
                if name == "BINPERSID":
                    found.append(values[0])
                value = tuple(values) if name.startswith("TUPLE") else " ".join(map(str, values)) if name == "STACK_GLOBAL" else argument
                stack += [_Entry(weight, value)] * len(code.stack_after)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its pickle is damaged: {error!r}") from None
    return found


def _take(stack: list[_Entry], before: Sequence[Any]) -> list[_Entry]:
    """Take from `stack` what an opcode takes, `before` as pickletools describes it."""
    taken: list[_Entry] = []
    count = len(before)
    if pickletools.markobject in before:
        count = before.index(pickletools.markobject)
        while (entry := stack.pop()) is not _MARK:
            taken.append(entry)
    taken += [stack.pop() for _ in range(count)]
    return taken[::-1]
