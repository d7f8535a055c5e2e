"""A package in the Neural Engine's form: both functions over one weight file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from coremltools.converters.mil.mil import Program

from elmexport.contracts.coreml import DECODE, Interface
from elmexport.graph.ir import Graph
from elmexport.quantization.weight_source import WeightSource
from targets.coreml.neural_engine.interface import description
from targets.coreml.neural_engine.lowering import lower
from targets.coreml.package import MODEL_FOLDER, finish_package
from targets.coreml.packing import WeightFile


def write_package(
    path: Path, graph: Graph, interface: Interface, weights: WeightSource, metadata: Mapping[str, str], advance: Callable[[int], None]
) -> dict[str, list[str]]:
    """Write the package `path` with the functions of `graph`. Returns the names of its inputs, outputs and states."""
    file = WeightFile(path / MODEL_FOLDER, weights, advance)
    program = Program()
    program.export_as_multifunction = True
    program.default_function_name = DECODE
    for name, tokens in interface.functions.items():
        program.add_function(name, lower(graph, tokens, file, interface))
    return finish_package(path, program, file, description, metadata)
