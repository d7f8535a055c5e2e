"""Runs an mlprogram on torch: a numerical reference for what a Core ML package computes, on any machine.

It is no model of a chip's numerics. In mode `fp16` each operation computes in float32 and rounds its result once to fp16 where the program
declares fp16 (`softmax`, a norm or a matrix product are one operation); the Neural Engine and GPUs accumulate and fuse in ways of their
own. Mode `fp32` rounds nothing. Values are held as float32, int32 or bool tensors; a declared narrower type only says how to round.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.runtimes.mil.plan import FAILURES, Plan, Step, make_plan
from elmexport.runtimes.mil.program import MilFunction, Program, TensorType, load_program
from elmexport.runtimes.mil.weights import WeightStore

Precision = Literal["fp16", "fp32"]
States = dict[str, Tensor]

_NUMPY: Mapping[str, str] = {"float16": "f2", "float32": "f4", "bool": "?"}  # any other type: int32


class MilModel:
    """The package at a path, or one already loaded. `budget` limits the bytes of decompressed weights kept in memory (default: a third of the machine's).

    Raises:
        ElmExportError: not a package, a damaged one, or one without an mlprogram; on first use of a function also an unknown operation.
    """

    def __init__(self, package: Path | Program, *, precision: Precision = "fp16", budget: int | None = None) -> None:
        self.program = package if isinstance(package, Program) else load_program(package)
        self.round_fp16 = precision == "fp16"
        self._store = WeightStore(self.program.files, round_fp16=self.round_fp16, budget=budget)
        self._plans: dict[str, Plan] = {}

    def function(self, name: str | None = None) -> MilFunction:
        """The function called `name`, or the default one, with the types of its inputs, states and outputs."""
        return self.program.function(name)

    def make_states(self, function: str | None = None) -> States:
        """States of zeros. They belong to the caller, and `run` updates them; functions with states of the same names can share them."""
        states = self.function(function).states
        return {name: torch.zeros(_static(name, kind)) for name, kind in states.items()}

    def predict(
        self, inputs: Mapping[str, NDArray[Any]], states: States | None = None, function: str | None = None
    ) -> dict[str, NDArray[Any]]:
        """`run` on and to arrays; outputs come in their declared types."""
        results = self.run({name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}, states, function)
        kinds = self.function(function).output_types()
        return {name: value.numpy().astype(_NUMPY.get(kinds[name].dtype, "i4")) for name, value in results.items()}

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor], states: States | None = None, function: str | None = None) -> dict[str, Tensor]:
        """Outputs by name, as float32, int32 or bool tensors.

        Raises:
            ElmExportError: inputs or states that the function does not have, or of another shape; an operation that failed.
        """
        plan = self._plan(function)
        values: list[Tensor | None] = [None] * plan.slots
        for name, tensor in self._checked(plan.function, inputs).items():
            values[plan.inputs[name]] = tensor
        states = {} if states is None else states
        if missing := set(plan.function.states) - set(states):
            raise ElmExportError(f"function {plan.function.name!r} needs the states {', '.join(sorted(missing))}; make_states() gives them")
        for step in plan.steps:
            try:
                _execute(step, values, states)
            except FAILURES as error:
                raise ElmExportError(
                    f"operation {step.operation.type} ({step.operation.name!r} in function {plan.function.name!r}) failed: {error}"
                ) from error
        outputs = {name: values[value] if isinstance(value, int) else value for name, value in plan.outputs.items()}
        # An output may be a view of a state or an input, which the caller changes next.
        return {name: value.clone() for name, value in outputs.items() if value is not None}

    def _plan(self, function: str | None) -> Plan:
        found = self.function(function)
        if found.name not in self._plans:
            self._plans[found.name] = make_plan(found, self._store, round_fp16=self.round_fp16)
        return self._plans[found.name]

    def _checked(self, function: MilFunction, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(inputs) != set(function.inputs):
            raise ElmExportError(f"function {function.name!r} takes the inputs {', '.join(function.inputs)}, not {', '.join(inputs)}")
        for name, kind in function.inputs.items():
            given = tuple(inputs[name].shape)
            if len(given) != len(kind.shape) or any(want not in (None, size) for want, size in zip(kind.shape, given, strict=True)):
                raise ElmExportError(f"input {name!r} of function {function.name!r} has shape {list(given)}; it takes {list(kind.shape)}")
        return {name: self._held(inputs[name], kind) for name, kind in function.inputs.items()}

    def _held(self, tensor: Tensor, kind: TensorType) -> Tensor:
        if kind.dtype == "bool":
            return tensor.to(torch.bool)
        if not kind.dtype.startswith("float"):
            return tensor.to(torch.int32)
        return tensor.half().float() if kind.dtype == "float16" and self.round_fp16 else tensor.to(torch.float32)


def _execute(step: Step, values: list[Tensor | None], states: States) -> None:
    if step.state is not None:
        if step.write is not None:
            data = values[step.write] if isinstance(step.write, int) else step.write
            assert data is not None
            if data is not states[step.state]:  # an update in place has happened already
                states[step.state] = data.clone(memory_format=torch.contiguous_format)
        elif step.outputs:
            values[step.outputs[0]] = states[step.state]
    else:
        assert step.function is not None
        arguments = dict(step.fixed)
        for name, slot in step.slots:
            arguments[name] = values[slot]
        for name, fetch in step.weights:
            arguments[name] = fetch()
        for name, slot in step.python:
            value = values[slot]
            assert value is not None
            arguments[name] = value.tolist()
        for name, entries in step.lists:
            arguments[name] = [values[entry] if isinstance(entry, int) else entry for entry in entries]
        result = step.function(**arguments)
        for slot, rounds, tensor in zip(step.outputs, step.rounds, result if isinstance(result, tuple) else (result,), strict=True):
            # A rounded operation's result is fresh memory (see ops.MOVES), so it is rounded where it lies.
            values[slot] = tensor.copy_(tensor.half()) if rounds else tensor
    for slot in step.frees:
        values[slot] = None


def _static(name: str, kind: TensorType) -> list[int]:
    shape = [size for size in kind.shape if size is not None]
    if len(shape) != len(kind.shape):
        raise ElmExportError(f"state {name!r} has a shape that is not fixed, {list(kind.shape)}, which Core ML does not allow")
    return shape
