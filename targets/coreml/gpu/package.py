"""The specification of the form for GPUs, and the files that swift-transformers wants beside the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import coremltools as ct
from coremltools.converters.mil.mil import Program

from elmexport.contracts.coreml_gpu import FUNCTION
from elmexport.graph.ir import Graph
from targets.coreml.gpu.interface import DESCRIPTIONS, input_ranges
from targets.coreml.gpu.lowering import lower
from targets.coreml.package import specification
from targets.coreml.packing import WeightFile


def write_specification(graph: Graph, file: WeightFile, metadata: Mapping[str, str], path: Path) -> None:
    """Lower `graph` to the package's one function, weights into `file`, and write the model specification to `path`."""
    function = lower(graph, file)
    function.set_input_types(
        tuple(
            ct.TensorType(name, tuple(low if low == high else ct.RangeDim(low, high, default=low) for low, high in ranges))
            for name, ranges in input_ranges(graph).items()
        )
    )
    program = Program()
    program.add_function(FUNCTION, function)
    model = specification(program, file)
    description = model.description
    for feature in (*description.input, *description.state, *description.output):
        feature.shortDescription = DESCRIPTIONS[feature.name]
    description.metadata.userDefined.update(metadata)
    path.write_bytes(model.SerializeToString(deterministic=True))
