"""Engines that run artifacts. `open_artifact` finds the one for a path; importing this package loads none of them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from elmexport.artifact import MANIFEST, Artifact
from elmexport.errors import ElmExportError
from elmexport.runtimes.base import Runtime

# By target. Each module has `open_runtime(folder) -> Runtime`, which takes an artifact folder or the bare model file or package.
RUNTIMES: Mapping[str, str] = {
    "onnx": "elmexport.runtimes.onnxruntime",
    "coreml": "elmexport.runtimes.coreml",
    "gguf": "elmexport.runtimes.llama_cpp",
    "checkpoint": "elmexport.runtimes.torch",
}
_SUFFIXES: Mapping[str, str] = {".onnx": "onnx", ".mlpackage": "coreml", ".gguf": "gguf"}


def open_artifact(path: str | Path) -> Runtime:
    """Open what an export wrote (or a bare `.onnx`, `.mlpackage` or `.gguf`, or a checkpoint folder) in the engine that runs it.

    Raises:
        ElmExportError: nothing there, not an artifact, or damaged files.
        MissingDependencyError: the engine is not installed.
    """
    path = Path(path)
    return open_as(artifact_kind(path), path)


def open_as(kind: str, path: Path, *, check: bool = False) -> Runtime:
    """Open `path` in the engine for `kind`, a key of `RUNTIMES`, without asking what it is.

    `check`: for a comparison with the model, which needs logits, even of an artifact that keeps them to itself. An engine that can look
    inside has an `open_for_check`.

    Raises:
        ElmExportError: no engine for that kind, or damaged files.
        MissingDependencyError: the engine is not installed.
    """
    if kind not in RUNTIMES:
        raise ElmExportError(f"no runtime opens artifacts of target {kind!r}; known: {', '.join(RUNTIMES)}")
    module = import_module(RUNTIMES[kind])
    runtime = getattr(module, "open_for_check" if check and hasattr(module, "open_for_check") else "open_runtime")(path)
    assert isinstance(runtime, Runtime)
    return runtime


def artifact_kind(path: Path) -> str:
    """The key of `RUNTIMES` for `path`.

    Raises:
        ElmExportError: nothing there, or nothing that a runtime opens.
    """
    if not path.exists():
        raise ElmExportError(f"{path}: no such file or folder; give the folder that an export printed")
    if (path / MANIFEST).is_file():
        artifact = Artifact.open(path)
        artifact.check_sizes()
        return artifact.target
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if (path / "config.json").is_file() or path.suffix == ".pt":
        return "checkpoint"
    raise ElmExportError(
        f"{path}: neither an artifact (a folder with {MANIFEST}), nor a {', '.join(_SUFFIXES)} file, nor a checkpoint folder with config.json; "
        "an export that was interrupted leaves no artifact: run it again"
    )
