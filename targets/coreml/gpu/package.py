"""A package in the form for GPUs: one function, with inputs of flexible size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import coremltools as ct
from coremltools.converters.mil.mil import Program

from elmexport.contracts.coreml_gpu import FUNCTION
from elmexport.graph.ir import Graph
from elmexport.quantization.weight_source import WeightSource
from targets.coreml.gpu.interface import DESCRIPTIONS, input_ranges
from targets.coreml.gpu.lowering import lower
from targets.coreml.package import MODEL_FOLDER, finish_package
from targets.coreml.packing import WeightFile


def write_package(path: Path, graph: Graph, weights: WeightSource, metadata: Mapping[str, str], advance: Callable[[int], None]) -> None:
    """Write the package `path` with the function of `graph`."""
    file = WeightFile(path / MODEL_FOLDER, weights, advance, rank=2, max_rows=None)
    function = lower(graph, file)
    function.set_input_types(
        tuple(
            ct.TensorType(name, tuple(low if low == high else ct.RangeDim(low, high, default=low) for low, high in ranges))
            for name, ranges in input_ranges(graph).items()
        )
    )
    program = Program()
    program.add_function(FUNCTION, function)
    finish_package(path, program, file, DESCRIPTIONS.__getitem__, metadata)
