"""Files that appear when they are complete, and safetensors files written and read tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from elmexport.errors import ElmExportError, listed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DTYPES = {
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.uint32": "U32",
    "torch.int64": "I64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
}


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write; it becomes `path` when it is complete and on the disk, and is removed on any error.

    Raises:
        OSError: as writing does.
    """
    partial = temporary_sibling(path, "partial")
    remove_stale(path, "partial")
    try:
        yield partial
        sync_file(partial)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # gone, renamed, or in a place where nothing can be
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all; one that is there is replaced.

    Raises:
        ElmExportError: the place cannot be written.
    """
    try:
        with complete_file(path) as partial:
            partial.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ElmExportError(f"cannot write {path}: {error.strerror or error}; choose another place") from None


def check_writable(path: Path, option: str = "--out") -> None:
    """Refuse a place where nothing can be written, before any work: tries it in the nearest folder above `path` that is there.

    Raises:
        ElmExportError: no folder, or one that takes no file; the message names `option`.
    """
    above = path.absolute().parent
    try:
        while not above.exists() and above != above.parent:
            above = above.parent
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ElmExportError(f"cannot write {path}: {reason} ({above}); choose another {option}") from None


def temporary_sibling(path: Path, kind: str) -> Path:
    """Name a hidden file or folder beside `path` after what it is ("partial", "old"), this machine and this process."""
    return path.with_name(f".{path.name}.{kind}-{_host()}-{os.getpid()}")


def remove_stale(path: Path, kind: str) -> None:
    """Remove the temporary siblings of `path` that killed processes left: those of a process that is gone, or has this one's number.

    In containers every process may have the same number. On a file system that machines share, nobody knows the processes of another one: what
    it left goes after a day.
    """
    _remove_leftovers(path.parent, _glob_escape(path.name), kind, own=True)


def remove_all_stale(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`, which nobody but us writes into, whatever it was to become."""
    _remove_leftovers(folder, "*", "partial", own=False)  # another thread of this process may be writing


def _remove_leftovers(folder: Path, pattern: str, kind: str, *, own: bool) -> None:
    for leftover in folder.glob(f".{pattern}.{kind}-*"):
        name = re.fullmatch(rf".*\.{kind}-(?:(\w+)-)?(\d+)", leftover.name)
        if name is None:
            continue
        pid, foreign = int(name[2]), name[1] not in (None, _host())
        if _older_than_a_day(leftover) if foreign else own if pid == os.getpid() else not _alive(pid):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Flush a file to the disk, so that a power cut after a rename cannot leave a complete name with incomplete content."""
    with path.open("r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


class SafetensorsWriter:
    """Writer of one safetensors file whose tensors come one at a time, in any order; types and shapes are known before."""

    def __init__(self, file: IO[bytes], layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> None:
        """`layout` has the type and shape of every tensor, in the order in which the file holds them."""
        self._file = file
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (dtype, shape) in layout.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPES[str(dtype)], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._start = len(text) + 8
        self._entries = {name: header[name] for name in layout}  # of those that are still to come

    def write(self, name: str, tensor: Tensor) -> None:
        import torch

        entry = self._entries.pop(name)
        assert (entry["dtype"], entry["shape"]) == (_DTYPES[str(tensor.dtype)], list(tensor.shape)), name
        self._file.seek(self._start + entry["data_offsets"][0])
        self._file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16

    def close(self) -> None:
        """Make sure that every tensor was written; the file itself stays open."""
        assert not self._entries, f"never written: {sorted(self._entries)[:3]}"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` one after another, so that mapped ones are never in memory together; the library's own writer gathers them first.

    Raises:
        OSError: it cannot be written; what was written remains.
    """
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    order = sorted(found, key=lambda name: (-found[name][0].itemsize, name))  # the library's own order: every tensor lies aligned
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, {name: found[name] for name in order}, metadata)
        for name in order:
            writer.write(name, tensors[name])
        writer.close()


class MappedTensors(Mapping[str, "Tensor"]):
    """Tensors of a safetensors file, mapped anew at every access. `fix` ends the messages of errors."""

    def __init__(self, path: Path, fix: str) -> None:
        from safetensors import safe_open

        self._path, self._fix = path, fix
        with safe_open(path, framework="pt") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            self._layout = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries.items()}

    def check(self, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Compare types and shapes with those that the tensors of `layout` have where they were written.

        Raises:
            ElmExportError: a tensor is missing, or has another type or shape.
        """
        missing = sorted(layout.keys() - self._layout.keys())
        if missing:
            raise ElmExportError(f"{self._path} is damaged: it lacks {listed(missing)}; {self._fix}")
        for name, (dtype, shape) in layout.items():
            found, wanted = self._layout[name], (_DTYPES[str(dtype)], shape)
            if found != wanted:
                raise ElmExportError(
                    f"{self._path} is damaged: {name} is {found[0]} {list(found[1])}, where {wanted[0]} {list(wanted[1])} belongs; {self._fix}"
                )

    def __getitem__(self, name: str) -> Tensor:
        """
        Raises:
            ElmExportError: the file has been changed since it was opened, or a vector holds NaN or infinity (matrices are not looked through).
        """
        from safetensors import SafetensorError, safe_open

        if name not in self._layout:
            raise KeyError(name)
        try:
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ElmExportError(f"{self._path} changed while it was in use ({error}); {self._fix}") from None
        if tensor.ndim == 1 and not bool(tensor.isfinite().all()):
            raise ElmExportError(f"{self._path} is damaged: {name} holds NaN or infinity; {self._fix}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


def read_metadata(path: Path, what: str, fix: str) -> dict[str, str]:
    """Read the metadata of a safetensors file, which is to be a `what`.

    Raises:
        ElmExportError: no such file, a damaged one, or one of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ElmExportError(f"{path} is no {what}, or is truncated or damaged ({error}); {fix}") from None
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}; give a {what}: {fix}") from None


def _glob_escape(name: str) -> str:
    """`name` as a glob pattern that matches only itself."""
    return re.sub(r"([\[\]*?])", r"[\1]", name)


def _host() -> str:
    """This machine's name in file names."""
    return re.sub(r"\W", "_", platform.node()) or "unknown"


def _older_than_a_day(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > 86400
    except OSError:  # gone
        return False


def _alive(pid: int) -> bool:
    if sys.platform == "win32":  # signal 0 is no question there, but Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
