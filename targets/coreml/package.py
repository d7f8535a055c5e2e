"""A `.mlpackage` from a program: specification, weight file, `Manifest.json`. Same inputs, same bytes.

coremltools' own packages carry random identifiers, and merging functions into one goes through saved single-function packages; here the
program with all its functions is translated at once.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter
from coremltools.converters.mil.mil import Program

from elmexport.graph.ir import Graph
from elmexport.quantization.weight_source import WeightSource
from elmexport.runtimes.coreml_contract import DECODE
from targets.coreml.interface import Form, description
from targets.coreml.lowering import lower
from targets.coreml.packing import Exporter, WeightFile

SPECIFICATION_VERSION = 9  # iOS 18, macOS 15: states, several functions, blockwise constexpr ops
MODEL_FOLDER = Path("Data", "com.apple.CoreML")
_AUTHOR = "com.apple.CoreML"


def write_package(
    path: Path, graph: Graph, form: Form, weights: WeightSource, metadata: Mapping[str, str], advance: Callable[[int], None]
) -> dict[str, list[str]]:
    """The package `path` with the functions of `graph` in the Neural Engine's form. Returns the names of its inputs, outputs and states."""
    data = path / MODEL_FOLDER
    file = WeightFile(data, weights, advance)
    features = write_specification(graph, file, form, metadata, data / "model.mlmodel")
    file.close()
    write_package_manifest(path)
    return features


def write_specification(graph: Graph, file: WeightFile, form: Form, metadata: Mapping[str, str], path: Path) -> dict[str, list[str]]:
    """Lower `graph` to the package's functions in the Neural Engine's form, weights into `file`, and write the model specification to `path`.

    Returns the names of the inputs, outputs and states that any function has.
    """
    program = Program()
    program.export_as_multifunction = True
    program.default_function_name = DECODE
    for name, tokens in form.functions.items():
        program.add_function(name, lower(graph, tokens, file, form))
    model = specification(program, file)
    _describe(model, metadata)
    path.write_bytes(model.SerializeToString(deterministic=True))
    described = model.description.functions
    return {
        kind: list(dict.fromkeys(feature.name for function in described for feature in getattr(function, kind.removesuffix("s"))))
        for kind in ("inputs", "outputs", "states")
    }


def specification(program: Program, file: WeightFile) -> Any:
    """The model specification of `program`, weights into `file`; nothing in it is described yet."""
    translated = Exporter(program, file, SPECIFICATION_VERSION).export()
    exporter = CoreMLProtoExporter(program, translated, "", "", None, "mlprogram", "milinternal", SPECIFICATION_VERSION)
    return exporter.export(SPECIFICATION_VERSION)


def write_package_manifest(package: Path) -> None:
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


def _describe(model: Any, metadata: Mapping[str, str]) -> None:
    assert isinstance(model, ct.proto.Model_pb2.Model)
    for function in model.description.functions:
        for feature in (*function.input, *function.state, *function.output):
            feature.shortDescription = description(feature.name)
    model.description.metadata.userDefined.update(metadata)


def _identifier(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"com.apple.CoreML/{name}")).upper()
