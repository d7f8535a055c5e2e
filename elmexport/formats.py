"""Registry of formats: one row says by which code each is written, run, read and tokenized. Strings only, so that a row costs nothing.

A package adds a format by an entry point in the group `elmexport.formats` whose object is a `Format`. Keep that object in a module that imports
nothing heavy: listing the commands loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from elmexport.errors import ElmExportError, MissingDependencyError

ENTRY_POINT_GROUP = "elmexport.formats"


@dataclass(frozen=True)
class Format:
    """One output format. References are "module:name"."""

    name: str  # in manifests, and the command that exports to it
    words: str  # ends the sentence "Export a model to …"
    target: str  # a subclass of `elmexport.target.Target`
    runtime: str  # `open(path) -> Runtime`, of an artifact folder or a bare model file
    reader: str  # `list_tensors(folder, config) -> Iterable[StoredTensor]`
    engine: str  # `Runtime.name` of what `runtime` opens
    engine_package: str | None = None  # what `runtime` imports when it opens a file; None: nothing that takes long
    # As `runtime`, for `CHECK_TOKENS` tokens at most, in less memory, and gives logits of artifacts that keep them to themselves; None: `runtime` does
    runtime_for_check: str | None = None
    tokenizer: str | None = None  # `Class(path) -> Tokenizer` where the model file holds one; None: it lies beside it
    suffixes: tuple[str, ...] = ()  # of bare model files (or folders, as `.mlpackage`)
    cache_bytes: int | None = None  # of a number in the KV cache; None: as wide as the activations


FORMATS: Mapping[str, Format] = {
    "onnx": Format(
        name="onnx",
        words="ONNX, for onnxruntime",
        target="targets.onnx:OnnxTarget",
        runtime="elmexport.runtimes.onnxruntime:open_runtime",
        runtime_for_check="elmexport.runtimes.onnxruntime:open_for_check",
        reader="targets.onnx.inspect:list_tensors",
        engine="onnxruntime",
        engine_package="onnxruntime",
        suffixes=(".onnx",),
    ),
    "coreml": Format(
        name="coreml",
        words="Core ML; works on Linux too",
        target="targets.coreml:CoreMLTarget",
        runtime="elmexport.runtimes.coreml:open_runtime",
        runtime_for_check="elmexport.runtimes.coreml:open_for_check",
        reader="targets.coreml.inspect:list_tensors",
        engine="core ml" if sys.platform == "darwin" else "mil executor",
        suffixes=(".mlpackage",),
    ),
    "gguf": Format(
        name="gguf",
        words="GGUF, for llama.cpp",
        target="targets.gguf:GgufTarget",
        runtime="elmexport.runtimes.llama_cpp:open_runtime",
        runtime_for_check="elmexport.runtimes.llama_cpp:open_for_check",
        reader="targets.gguf.inspect:list_tensors",
        engine="llama.cpp",
        engine_package="llama_cpp",
        tokenizer="elmexport.runtimes.llama_cpp_tokenizer:LlamaCppTokenizer",
        suffixes=(".gguf",),
        cache_bytes=4,  # the runtime keeps fp32 whatever the weights are
    ),
    "mlx": Format(
        name="mlx",
        words="MLX, for mlx-lm",
        target="targets.mlx:MlxTarget",
        runtime="elmexport.runtimes.mlx:open_runtime",
        reader="targets.mlx.inspect:list_tensors",
        engine="mlx",
        engine_package="mlx_lm",
        cache_bytes=None if sys.platform == "darwin" else 4,  # on CPUs the runtime computes in fp32
    ),
}


def format_names() -> tuple[str, ...]:
    """The names of all formats, the built-in ones first. Loads no package."""
    return (*FORMATS, *_installed())


def find_format(name: str, what: str = "format") -> Format:
    """Find a format by name; `what` begins the message where there is none.

    Raises:
        ElmExportError: nothing here knows it, or the package that adds it does not load.
    """
    if name in FORMATS:
        return FORMATS[name]
    if name not in _installed():
        raise ElmExportError(
            f"{what} is {name!r}, which nothing here knows; known: {', '.join(format_names())}. Install the package that adds it, or update elmexport"
        )
    return _load(_installed()[name])


def formats() -> Iterator[Format]:
    """Every format, the built-in ones first.

    Raises:
        ElmExportError: a package that adds one does not load.
    """
    yield from FORMATS.values()
    for point in _installed().values():
        yield _load(point)


def load(reference: str) -> Any:
    """Import what "module:name" refers to.

    Raises:
        MissingDependencyError: the module, or something that it imports, is not installed.
    """
    module, _, name = reference.partition(":")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise MissingDependencyError(f"{module} cannot be imported ({error}); install what it needs") from error


@cache
def _installed() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in FORMATS}


@cache
def _load(point: EntryPoint) -> Format:
    package = "?" if point.dist is None else point.dist.name
    try:
        found = point.load()
    except Exception as error:  # whatever another's code may raise
        raise ElmExportError(
            f"the format {point.name} of the package {package} does not load ({error}); mend or remove that package"
        ) from error
    if not isinstance(found, Format) or found.name != point.name:
        raise ElmExportError(
            f"the entry point {point.name} of the package {package} is {found!r}, where a Format called {point.name!r} belongs; mend or remove that package"
        )
    return found
