"""The output folder: written beside its final place, renamed when complete, described by `manifest.json`, verifiable by hash.

A killed export leaves a folder whose name says `.partial`, never one that looks finished. Same inputs give the same bytes: nothing here
records a time or a path of the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from elmexport.errors import ElmExportError
from elmexport.files import check_writable, remove_stale, sync_file, temporary_sibling
from elmexport.formats import find_format
from elmexport.manifest import FIX, FileFacts, Manifest, read_manifest
from elmexport.progress import Progress, SilentProgress
from elmexport.weights import Role

MANIFEST = "manifest.json"
_BLOCK = 1 << 22  # bytes of a file that are hashed at a time


@contextlib.contextmanager
def artifact_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write into; on success it becomes `out`, on any error it is removed.

    Raises:
        ElmExportError: `out` exists and `force` is false, `out` is not a folder, or its parent cannot be written.
    """
    out = Path(os.path.realpath(out))  # behind a link: what is replaced is the folder, not the link to it
    check_free(out, force=force)
    partial = temporary_sibling(out, "partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out, "partial")
        partial.mkdir()
        yield partial
        _sync(partial)
        _replace(partial, out)
        remove_stale(out, "old")  # an old artifact that was set aside goes only when a new one has taken its place
    except OSError as error:
        reason = error.strerror or error
        if error.filename is not None and not _on_the_way(Path(error.filename).absolute(), out.parent):
            raise ElmExportError(f"cannot read {error.filename}: {reason}. Nothing was left behind") from error
        raise ElmExportError(f"cannot write {out}: {reason}; free space or choose another --out. Nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out: Path, *, force: bool) -> None:
    """Refuse, before any work, an output that would overwrite something, or a place that cannot be written.

    Raises:
        ElmExportError: `out` exists and `force` is false, `out` is something other than an artifact folder, or its place takes no files.
    """
    try:
        _check_free(out, force)
        check_writable(Path(os.path.realpath(out)))  # behind a link: what is replaced is the folder, not the link to it
    except OSError as error:  # a name too long, a folder closed to this user
        raise ElmExportError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def _check_free(out: Path, force: bool) -> None:
    try:
        os.path.abspath(out).encode("utf-8")
    except UnicodeEncodeError:  # the engines take UTF-8 only
        raise ElmExportError(
            f"cannot write {str(out)!r}: the path is not text in the encoding {sys.getfilesystemencoding()}; choose another --out, or use UTF-8"
        ) from None
    if not out.exists():
        return
    if not force:
        raise ElmExportError(f"{out} exists already; pass --force to replace it, or choose another place with --out")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise ElmExportError(
            f"{out} is not an artifact folder (it holds no {MANIFEST}), so --force will not replace it; choose another place with --out"
        )


def write_manifest(folder: Path, manifest: Manifest, progress: Progress | None = None) -> Manifest:
    """Write `manifest.json`, its `files` filled in: SHA-256 and size in bytes of every file in `folder`. Returns it as written.

    Raises:
        ElmExportError: something in it that no manifest may hold, as a target's setting that is a list.
    """
    progress, sizes = progress or SilentProgress(), {path: path.stat().st_size for path in _files(folder)}
    progress.stage("hashing files", sum(sizes.values()))
    listing = {path.relative_to(folder).as_posix(): FileFacts(size, file_sha256(path, progress)) for path, size in sizes.items()}
    text = msgspec.structs.replace(manifest, files=listing).to_json().encode()
    complete = read_manifest(text, MANIFEST)  # or nobody could read it later
    (folder / MANIFEST).write_bytes(text)
    return complete


@dataclass(frozen=True)
class Artifact:
    """A finished artifact folder."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read the manifest.

        Raises:
            ElmExportError: no manifest, a damaged one, one of a newer version, or of a format that nobody here knows.
        """
        file = path / MANIFEST
        try:
            text = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ElmExportError(f"{path} holds no {MANIFEST}: it is not an artifact, or its export was interrupted; {FIX}") from None
        except OSError as error:
            raise ElmExportError(f"cannot read {file}: {error.strerror or error}; copy the artifact again or {FIX}") from None
        manifest = read_manifest(text, str(file))
        find_format(manifest.target, f"{file}: target")
        return cls(path, manifest)

    @property
    def target(self) -> str:
        return self.manifest.target

    def check_sizes(self) -> None:
        """Compare presence and size of every file with the manifest; instant.

        Raises:
            ElmExportError: a file is missing or has another size.
        """
        problems = [problem for name, facts in self.manifest.files.items() if (problem := _size_problem(self.path / name, name, facts))]
        if problems:
            raise ElmExportError(f"{self.path} is damaged: {'; '.join(problems)}. Copy it again or export it again")

    def verify(self, progress: Progress | None = None) -> list[str]:
        """Compare every file's SHA-256 with the manifest, and look for files it does not list; returns the problems found."""
        progress, problems = progress or SilentProgress(), []
        progress.stage("verifying files", sum(facts.bytes for facts in self.manifest.files.values()))
        for name, facts in self.manifest.files.items():
            problem = _size_problem(self.path / name, name, facts)
            if problem is None and file_sha256(self.path / name, progress) != facts.sha256:
                problem = f"{name} has been altered (its SHA-256 differs from the manifest's)"
            if problem is not None:
                problems.append(problem)
        found = {path.relative_to(self.path).as_posix() for path in _files(self.path)} - {MANIFEST}
        return problems + [f"{name} is not in the manifest" for name in sorted(found - set(self.manifest.files))]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an artifact's files."""

    name: str  # in the file
    role: Role | None  # None for what is no weight of the model: tables of angles, masks, constants of the graph
    scheme: str  # how it is stored, in the format's words: "Q4_0", "4-bit, blocks of 32", "float16"
    shape: tuple[int, ...]  # logical, outermost axis first: [out, in] for a matrix
    bytes: int  # in the file, scales included


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file, as hex. `progress` receives its bytes as they are read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if progress is not None:
                progress.advance(len(block))
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _size_problem(path: Path, name: str, facts: FileFacts) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    return None if size == facts.bytes else f"{name} has {size} bytes, the manifest says {facts.bytes}"


def _on_the_way(path: Path, folder: Path) -> bool:
    """Whether `path` lies in `folder`, or is one of the folders above it, which are made where they lack."""
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def _sync(folder: Path) -> None:
    for path in _files(folder):
        sync_file(path)


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = temporary_sibling(out, "old")
    shutil.rmtree(old, ignore_errors=True)  # of a killed process with this one's number; `out` has taken its place
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
