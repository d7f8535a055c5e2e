"""A `.mlpackage` from a program: specification, weight file, `Manifest.json`. Same inputs, same bytes.

coremltools' own packages carry random identifiers, and merging functions into one goes through saved single-function packages; here the
program with all its functions is translated at once.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter
from coremltools.converters.mil.mil import Program

from targets.coreml.packing import Exporter, WeightFile

SPECIFICATION_VERSION = 9  # iOS 18, macOS 15: states, several functions, blockwise constexpr ops
MODEL_FOLDER = Path("Data", "com.apple.CoreML")
_AUTHOR = "com.apple.CoreML"


def finish_package(
    path: Path, program: Program, file: WeightFile, describe: Callable[[str], str], metadata: Mapping[str, str]
) -> dict[str, list[str]]:
    """Write the model specification of `program` and the manifest into the package `path`, whose weights are in `file`, and close that.

    `describe` says what an input, state or output is. Returns the names of the inputs, outputs and states that any function has.
    """
    model = _specification(program, file)
    functions: Sequence[Any] = model.description.functions or [model.description]  # the description of a single function is the model's
    for function in functions:
        for feature in (*function.input, *function.state, *function.output):
            feature.shortDescription = describe(feature.name)
    model.description.metadata.userDefined.update(metadata)
    (path / MODEL_FOLDER / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    file.close()
    _write_manifest(path)
    return {
        kind: list(dict.fromkeys(feature.name for function in functions for feature in getattr(function, kind.removesuffix("s"))))
        for kind in ("inputs", "outputs", "states")
    }


def _specification(program: Program, file: WeightFile) -> Any:
    """The model specification of `program`, weights into `file`; nothing in it is described yet."""
    translated = Exporter(program, file, SPECIFICATION_VERSION).export()
    exporter = CoreMLProtoExporter(program, translated, "", "", None, "mlprogram", "milinternal", SPECIFICATION_VERSION)
    return exporter.export(SPECIFICATION_VERSION)


def _write_manifest(package: Path) -> None:
    """`Manifest.json`, which names the package's two items. Identifiers are derived from the items' names."""
    items = {
        "model.mlmodel": ("CoreML Model Specification", "com.apple.CoreML/model.mlmodel"),
        "weights": ("CoreML Model Weights", "com.apple.CoreML/weights"),
    }
    entries = {
        _identifier(name): {"author": _AUTHOR, "description": description, "name": name, "path": path}
        for name, (description, path) in items.items()
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": _identifier("model.mlmodel")}
    # Sorted, because coremltools writes the file back so when it opens a package: its hash is to stay what it is.
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _identifier(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"com.apple.CoreML/{name}")).upper()
