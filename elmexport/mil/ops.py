"""The operations that the executor knows, by MIL name. States and constants are the executor's own business."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import Any

from elmexport.mil import ops_elementwise, ops_image, ops_linear, ops_movement, ops_reduction

OPS: Mapping[str, Callable[..., Any]] = {
    **ops_elementwise.OPS,
    **ops_image.OPS,
    **ops_linear.OPS,
    **ops_movement.OPS,
    **ops_reduction.OPS,
}

# Exact, so not rounded again; and their results may share memory with their inputs. All others give fresh tensors.
MOVES = frozenset(ops_movement.OPS)


class ParameterKind(Enum):
    """Kind of argument that a parameter of an operation receives."""

    TENSOR = "tensor"
    TENSORS = "list of tensors"
    PYTHON = "number, string or list"


@cache
def parameters(type: str) -> Mapping[str, tuple[ParameterKind, bool]]:
    """Parameters of the operation `type`: each one's kind, and whether it must be given."""
    found = {}
    for name, parameter in inspect.signature(OPS[type]).parameters.items():
        annotation = str(parameter.annotation)
        kind = (
            ParameterKind.TENSORS
            if annotation == "list[Tensor]"
            else ParameterKind.TENSOR
            if annotation.startswith("Tensor")
            else ParameterKind.PYTHON
        )
        found[name] = (kind, parameter.default is parameter.empty)
    return found
