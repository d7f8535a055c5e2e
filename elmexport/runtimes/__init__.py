"""Engines that run artifacts. `open_artifact` finds the one for a path; importing this package loads none of them."""

from __future__ import annotations

import contextlib
import platform
from functools import cache
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path

from elmexport import __version__
from elmexport.artifact import MANIFEST, Artifact
from elmexport.errors import ElmExportError
from elmexport.formats import find_format, formats, load
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.probing import probe

CHECKPOINT = "checkpoint"  # the kind of a model that is no artifact; torch runs it


def open_artifact(path: str | Path) -> Runtime:
    """Open what an export wrote (or a bare model file, or a checkpoint folder) in the engine that runs it.

    Raises:
        ElmExportError: nothing there, not an artifact, or damaged files.
        MissingDependencyError: the engine is not installed.
    """
    path = Path(path)
    return open_as(artifact_kind(path), path)


def open_as(kind: str, path: Path) -> Runtime:
    """Open `path` in the engine for `kind`, the name of a format or `CHECKPOINT`.

    What was never opened before is opened in a process of its own first.

    Raises:
        ElmExportError: no engine for that kind, damaged files, or some that make the engine end its process (see `probe`).
        MissingDependencyError: the engine is not installed.
    """
    if kind != CHECKPOINT:
        probe(kind, path)
    return open_directly(kind, path)


def open_directly(kind: str, path: Path, *, check: bool = False) -> Runtime:
    """Open `path` as `open_as` does, where it is known that the engine survives it.

    `check`: for a comparison with the model, which needs logits, even of an artifact that keeps them to itself.

    Raises:
        ElmExportError: no engine for that kind, or damaged files.
        MissingDependencyError: the engine is not installed.
    """
    if kind == CHECKPOINT:
        reference = "elmexport.runtimes.torch:open_runtime"
    else:
        row = find_format(kind)
        reference = (row.runtime_for_check if check else None) or row.runtime
    runtime = load(reference)(path)
    assert isinstance(runtime, Runtime)
    return runtime


def artifact_kind(path: Path) -> str:
    """Tell what `path` is: the name of a format, or `CHECKPOINT`.

    Raises:
        ElmExportError: nothing there, or nothing that a runtime opens.
    """
    if not path.exists():
        raise ElmExportError(f"{path}: no such file or folder; give the folder that an export printed")
    if (path / MANIFEST).is_file():
        artifact = Artifact.open(path)
        artifact.check_sizes()
        return artifact.target
    suffixes: list[str] = []
    for row in formats():
        if path.suffix in row.suffixes:
            return row.name
        suffixes += row.suffixes
    if (path / "config.json").is_file() or path.suffix == ".pt":
        return CHECKPOINT
    raise ElmExportError(
        f"{path}: neither an artifact (a folder with {MANIFEST}), nor a {', '.join(suffixes)} file, nor a checkpoint folder with config.json; "
        "an export that was interrupted leaves no artifact: run it again"
    )


def engine_name(kind: str) -> str:
    """Tell the `Runtime.name` that an artifact of `kind` will have once it is open."""
    return "torch" if kind == CHECKPOINT else find_format(kind).engine


def engine_version(kind: str) -> str:
    """Tell the versions of what computes an artifact of `kind`: its engine, this package, the system."""
    row = None if kind == CHECKPOINT else find_format(kind)
    # An engine without a package is this one's own, over torch, or Core ML, which macOS brings.
    package = (row.engine_package if row is not None else None) or "torch"
    return f"{package} {_installed_version(package)}, elmexport {__version__}, {platform.mac_ver()[0] or platform.system()}"


def _installed_version(package: str) -> str:
    """The version of the distribution that brings a package of that name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return _version_of_another_name(package)


@cache
def _version_of_another_name(package: str) -> str:
    # `packages_distributions` makes a path of each of a hundred thousand files: half a second.
    return next((one.version for one in distributions() if _brings(one, package)), "not installed")


def _brings(distribution: Distribution, package: str) -> bool:
    listed, files = distribution.read_text("top_level.txt") or "", distribution.read_text("RECORD") or ""
    return package in listed.split() or f"\n{package}/__init__.py," in f"\n{files}"


def preload(kind: str) -> None:
    """Import the runtime of `kind` and its engine, so that opening an artifact takes the artifact's own time alone."""
    if kind == CHECKPOINT:
        import_module("elmexport.runtimes.torch")
        return
    row = find_format(kind)
    load(row.runtime)
    if row.engine_package is not None:
        with contextlib.suppress(ModuleNotFoundError):  # the runtime says how to install it
            import_module(row.engine_package)
