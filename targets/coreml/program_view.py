"""View of a program for the linter: operations with the types of what goes in, and whether they lie before or behind all heavy work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmexport.mil.blob import BlobFile
from elmexport.mil.program import Argument, BlobFileValue, ImmediateValue, MilFunction, Operation, Program, TensorType, ValueReference

# What the Neural Engine is there for. Operations that none of these precedes, or none of these follows, are at the edge of a function.
_WORK = [
    "conv",
    "conv_transpose",
    "linear",
    "matmul",
    "einsum",
    "scaled_dot_product_attention",
    "softmax",
    "layer_norm",
    "batch_norm",
    "instance_norm",
    "l2_norm",
    "avg_pool",
    "max_pool",
]

Typed = tuple[str, TensorType]


@dataclass(frozen=True)
class OperationView:
    """View of an operation that computes something.

    `tensors` are its inputs that are no constants, `weights` the parameters that are constants of two or more axes, `shapes` the shape of every
    parameter that is a tensor. `edge`: none of the heavy operations precedes it, or none follows. There the CPU can do it before the Neural
    Engine begins or after it has ended, so it causes no switch between the two.
    """

    operation: Operation
    tensors: tuple[Typed, ...]
    weights: tuple[str, ...]
    shapes: Mapping[str, tuple[int | None, ...]]
    edge: bool
    _immediates: Mapping[str, ImmediateValue]
    _files: Mapping[Path, BlobFile]

    @property
    def type(self) -> str:
        return self.operation.type

    @property
    def outputs(self) -> tuple[Typed, ...]:
        return self.operation.outputs

    @property
    def name(self) -> str:
        """Its own name, or that of its first output."""
        return self.operation.name or (self.outputs[0][0] if self.outputs else "")

    def integer(self, parameter: str) -> int | None:
        """The value of a parameter that is a constant number."""
        for argument in self.operation.arguments.get(parameter, ()):
            immediate = self._immediates.get(argument.name) if isinstance(argument, ValueReference) else argument
            if isinstance(immediate, ImmediateValue) and not isinstance(immediate.value, str):
                return int(immediate.value)
        return None

    def read(self, blob: BlobFileValue) -> NDArray[Any]:
        """A constant of the weight file; a view of the file."""
        return self._files[blob.file].read(blob.offset, blob.dtype, blob.shape)


class FunctionView:
    """View of a function."""

    def __init__(self, program: Program, function: MilFunction) -> None:
        self.function, self._files = function, program.files
        self._types = dict(function.inputs) | dict(function.states) | {n: k for op in function.operations for n, k in op.outputs}
        self._immediates = {
            op.outputs[0][0]: value
            for op in function.operations
            if op.type == "const" and isinstance(value := op.arguments["val"][0], ImmediateValue)
        }
        self._constants = self._constant_values()

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def states(self) -> tuple[Typed, ...]:
        return tuple(self.function.states.items())

    @property
    def boundary(self) -> tuple[Typed, ...]:
        """Inputs, states and outputs."""
        return (*self.function.inputs.items(), *self.states, *self.function.output_types().items())

    @cached_property
    def constants(self) -> tuple[OperationView, ...]:
        """Constants, and operations on constants alone, which are computed when the program is compiled."""
        return tuple(self._view(op, True) for op in self.function.operations if self._is_constant(op))

    @cached_property
    def operations(self) -> tuple[OperationView, ...]:
        """The others, in the program's order."""
        before, after = self._behind_work(), self._before_work()
        return tuple(
            self._view(op, not (before[op.outputs[0][0]] and after[op.outputs[0][0]]))
            for op in self.function.operations
            if op.outputs and not self._is_constant(op)
        )

    def _view(self, operation: Operation, edge: bool) -> OperationView:
        kinds = {key: kind for key, argument in _single(operation) if (kind := self._type(argument)) is not None}
        tensors = tuple(
            (key if len(arguments) == 1 else f"{key}[{i}]", kind)
            for key, arguments in operation.arguments.items()
            for i, argument in enumerate(arguments)
            if isinstance(argument, ValueReference) and argument.name not in self._constants and (kind := self._type(argument)) is not None
        )
        weights = tuple(key for key, argument in _single(operation) if key in kinds and len(kinds[key].shape) > 1 and self._fixed(argument))
        return OperationView(
            operation, tensors, weights, {key: kind.shape for key, kind in kinds.items()}, edge, self._immediates, self._files
        )

    def _type(self, argument: Argument) -> TensorType | None:
        if isinstance(argument, ValueReference):
            return self._types.get(argument.name)
        if isinstance(argument, BlobFileValue):
            return TensorType(argument.dtype, argument.shape)
        return None if isinstance(argument.value, str) else TensorType(argument.value.dtype.name, np.shape(argument.value))

    def _fixed(self, argument: Argument) -> bool:
        return not isinstance(argument, ValueReference) or argument.name in self._constants

    def _is_constant(self, operation: Operation) -> bool:
        return all(name in self._constants for name, _ in operation.outputs) and bool(operation.outputs)

    def _constant_values(self) -> set[str]:
        found: set[str] = set()
        for operation in self.function.operations:
            references = [a.name for arguments in operation.arguments.values() for a in arguments if isinstance(a, ValueReference)]
            if operation.type == "const" or operation.type.startswith("constexpr_") or (references and found.issuperset(references)):
                found.update(name for name, _ in operation.outputs)
        return found

    def _behind_work(self) -> dict[str, bool]:
        """For each value, whether a heavy operation gave it or precedes it."""
        found = dict.fromkeys([*self.function.inputs, *self.function.states], False)
        for operation in self.function.operations:
            here = operation.type in _WORK or any(found.get(name, False) for name in _references(operation))
            found.update((name, here) for name, _ in operation.outputs)
        return found

    def _before_work(self) -> dict[str, bool]:
        """For each value, whether a heavy operation gave it or follows it."""
        found: dict[str, bool] = {}
        for operation in reversed(self.function.operations):
            heavy = operation.type in _WORK or any(found.get(name, False) for name, _ in operation.outputs)
            found.update((name, heavy) for name, _ in operation.outputs)
            for name in _references(operation):
                found[name] = found.get(name, False) or heavy
        return found


def _single(operation: Operation) -> Iterator[tuple[str, Argument]]:
    return ((key, arguments[0]) for key, arguments in operation.arguments.items() if len(arguments) == 1)


def _references(operation: Operation) -> Iterator[str]:
    return (a.name for arguments in operation.arguments.values() for a in arguments if isinstance(a, ValueReference))
