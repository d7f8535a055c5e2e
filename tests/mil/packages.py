"""Small packages for tests, lowered by coremltools' own builder and exporter, without its passes: what is written is what was built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.backend.mil.load import MILProtoExporter
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types
from coremltools.proto import Model_pb2
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
Build = Callable[..., Any]


def function(specs: Mapping[str, Any], build: Build, opset: Any = ct.target.iOS18) -> Function:
    """A function with inputs and states `specs`, whose outputs are what `build` makes of them."""
    with Function(dict(specs), opset_version=opset) as made:
        outputs = build(**made.inputs)
        made.set_outputs(list(outputs) if isinstance(outputs, list | tuple) else [outputs])
    return made


def spec(array: NDArray[Any]) -> Any:
    return mb.TensorSpec(array.shape, dtype=types.numpy_type_to_builtin_type(array.dtype))


def write_package(path: Path, functions: Mapping[str, Function], version: int = 9) -> Path:
    data = path / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    program = Program()
    for name, made in functions.items():
        program.add_function(name, made)
    program.default_function_name = next(iter(functions))
    if len(functions) > 1:
        program.export_as_multifunction = True
    model = Model_pb2.Model(specificationVersion=version)
    exporter = MILProtoExporter(program, str(data / "weights"), version)
    model.mlProgram.CopyFrom(exporter.export())
    exporter.blob_writers.clear()  # the writer flushes when it goes
    (data / "model.mlmodel").write_bytes(model.SerializeToString())
    items = {"root": {"path": "com.apple.CoreML/model.mlmodel"}, "weights": {"path": "com.apple.CoreML/weights"}}
    (path / "Manifest.json").write_text(json.dumps({"itemInfoEntries": items, "rootModelIdentifier": "root"}))
    return path


def inferred(operation: str, inputs: Mapping[str, Any], constants: Mapping[str, Any]) -> list[NDArray[Any]]:
    """What coremltools itself computes, given everything as constants."""
    with Function({}, opset_version=ct.target.iOS18):
        result = getattr(mb, operation)(**inputs, **constants)
    values = [var.val for var in (result if isinstance(result, list | tuple) else [result])]
    assert all(value is not None for value in values), f"coremltools does not infer {operation}"
    return [np.asarray(value) for value in values]
