"""Executor of mlprograms on torch: a numerical reference for what a Core ML package computes, on any machine.

It is no model of a chip's numerics. In mode `fp16` each operation computes in float32 and rounds its result once to fp16 where the program
declares fp16 (`softmax`, a norm or a matrix product are one operation); the Neural Engine and GPUs accumulate and fuse in ways of their
own. Mode `fp32` rounds nothing. Values are held as float32, int32 or bool tensors; a declared narrower type only says how to round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.mil.narrowing import narrow
from elmexport.mil.plan import FAILURES, AxisSizes, DynamicAxes, ExecutionPlan, Step, make_plan
from elmexport.mil.program import MilFunction, Program, TensorType, load_program
from elmexport.mil.weights import WeightStore

Precision = Literal["fp16", "fp32"]
States = dict[str, Tensor]

_NUMPY: Mapping[str, str] = {"float16": "f2", "float32": "f4", "bool": "?"}  # any other type: int32


class MilModel:
    """A Core ML package that can be run.

    `package` is its path, or the program already loaded. `budget` limits the bytes of decompressed weights kept in memory (default: a third of
    the machine's).

    Raises:
        ElmExportError: not a package, a damaged one, or one without an mlprogram; on first use of a function also an unknown operation.
    """

    def __init__(self, package: Path | Program, *, precision: Precision = "fp16", budget: int | None = None) -> None:
        self.program = package if isinstance(package, Program) else load_program(package)
        self.round_fp16 = precision == "fp16"
        self._store = WeightStore(self.program.files, round_fp16=self.round_fp16, budget=budget)
        self._plans: dict[tuple[str, frozenset[str] | None], ExecutionPlan] = {}

    def function(self, name: str | None = None) -> MilFunction:
        """The function called `name`, or the default one, with the types of its inputs, states and outputs."""
        return self.program.function(name)

    def make_states(self, function: str | None = None) -> States:
        """Make states of zeros. They belong to the caller, and `run` updates them; functions with states of the same names can share them."""
        states = self.function(function).states
        return {name: torch.zeros(_static(name, kind)) for name, kind in states.items()}

    def predict(
        self, inputs: Mapping[str, NDArray[Any]], states: States | None = None, function: str | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run a function on numpy arrays; outputs come in their declared types. See `run`."""
        results = self.run({name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}, states, function)
        kinds = self.function(function).output_types()
        return {name: value.numpy().astype(_NUMPY.get(kinds[name].dtype, "i4")) for name, value in results.items()}

    @torch.inference_mode()
    def run(
        self,
        inputs: Mapping[str, Tensor],
        states: States | None = None,
        function: str | None = None,
        *,
        outputs: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """Run a function: outputs by name, as float32, int32 or bool tensors; only `outputs` are computed if they are given.

        Raises:
            ElmExportError: inputs or states that the function does not have, or of another shape; an operation that failed.
        """
        return self._run(self._plan(function, outputs), inputs, {} if states is None else states)

    @torch.inference_mode()
    def run_batch(
        self,
        inputs: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        states: States,
        function: str | None = None,
        *,
        outputs: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """Run a function on a batch, the first axis that `inputs` and `states` have here and outputs get; `shared` inputs are common.

        Raises:
            ElmExportError: as `run`; also where operations take a Python number that differs from entry to entry.
        """
        plan = self._plan(function, outputs)

        def one(inputs: dict[str, Tensor], states: States) -> tuple[dict[str, Tensor], States]:
            return self._run(plan, {**inputs, **shared}, states), states

        results, after = torch.vmap(one)(dict(inputs), dict(states))
        states.update(after)
        return dict(results)

    def _run(self, plan: ExecutionPlan, inputs: Mapping[str, Tensor], states: States) -> dict[str, Tensor]:
        if missing := set(plan.function.states) - set(states):
            raise ElmExportError(f"function {plan.function.name!r} needs the states {', '.join(sorted(missing))}; make_states() gives them")
        sizes = _sizes(plan, inputs, states)
        values: list[Tensor | None] = [None] * plan.slots
        for name, tensor in self._checked(plan, inputs, sizes).items():
            values[plan.inputs[name]] = tensor
        for step in plan.steps:
            try:
                _execute(step, values, states, sizes)
            except FAILURES as error:
                raise ElmExportError(
                    f"operation {step.operation.type} ({step.operation.name!r} in function {plan.function.name!r}) failed: {error}"
                ) from error
        results = {name: values[value] if isinstance(value, int) else value for name, value in plan.outputs.items()}
        # An output may be a view of a state or an input, which the caller changes next.
        return {name: value.clone() for name, value in results.items() if value is not None}

    def narrowed(self, axes: DynamicAxes, function: str | None = None) -> MilModel:
        """Make a model, the weights shared, whose `function` can run on shorter inputs and states.

        They may be shorter along `axes`, and of any length along those of declared length 1 (see `elmexport.mil.narrowing`).

        Raises:
            CannotNarrowError: the function needs an axis in full.
        """
        plan = narrow(self._plan(function), axes)
        model = copy(self)
        model._plans = {key: other for key, other in self._plans.items() if key[0] != plan.function.name}
        model._plans[plan.function.name, None] = plan
        return model

    def _plan(self, function: str | None, outputs: Collection[str] | None = None) -> ExecutionPlan:
        found = self.function(function)
        key = found.name, None if outputs is None else frozenset(outputs)
        if key not in self._plans:
            if outputs is None:
                self._plans[key] = make_plan(found, self._store, round_fp16=self.round_fp16)
            else:
                self._plans[key] = self._plan(function).only(outputs)
        return self._plans[key]

    def _checked(self, plan: ExecutionPlan, inputs: Mapping[str, Tensor], sizes: AxisSizes) -> dict[str, Tensor]:
        function = plan.function
        if set(inputs) != set(function.inputs):
            raise ElmExportError(f"function {function.name!r} takes the inputs {', '.join(function.inputs)}, not {', '.join(inputs)}")
        for name, kind in function.inputs.items():
            given = list(inputs[name].shape)
            for size, places in plan.narrowed.items():
                for axis in (axis for place, axis in places if place == name and axis < len(given)):
                    if given[axis] == sizes[size]:
                        given[axis] = kind.shape[axis] or 0
            if len(given) != len(kind.shape) or any(want not in (None, size) for want, size in zip(kind.shape, given, strict=True)):
                raise ElmExportError(
                    f"input {name!r} of function {function.name!r} has shape {list(inputs[name].shape)}; it takes {list(kind.shape)}"
                )
        return {name: self._held(inputs[name], kind) for name, kind in function.inputs.items()}

    def _held(self, tensor: Tensor, kind: TensorType) -> Tensor:
        if kind.dtype == "bool":
            return tensor.to(torch.bool)
        if not kind.dtype.startswith("float"):
            return tensor.to(torch.int32)
        return tensor.half().float() if kind.dtype == "float16" and self.round_fp16 else tensor.to(torch.float32)


def executor_name(precision: Precision) -> str:
    """Name of the executor as an engine."""
    return "mil executor" if precision == "fp16" else f"mil executor, {precision}"


def _execute(step: Step, values: list[Tensor | None], states: States, sizes: AxisSizes) -> None:
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
        if step.adjust is not None:
            step.adjust(arguments, sizes)
        result = step.function(**arguments)
        for slot, rounds, tensor in zip(step.outputs, step.rounds, result if isinstance(result, tuple) else (result,), strict=True):
            # A rounded operation's result is fresh memory (see ops.MOVES), so it is rounded where it lies.
            values[slot] = tensor.copy_(tensor.half()) if rounds else tensor
    for slot in step.frees:
        values[slot] = None


def _sizes(plan: ExecutionPlan, inputs: Mapping[str, Tensor], states: States) -> AxisSizes:
    """Sizes of the axes that may be narrowed, by name.

    Raises:
        ElmExportError: two places of one axis differ in size, or one is larger than the function declares, if that is more than 1.
    """
    sizes: dict[str, int] = {}
    for name, places in plan.narrowed.items():
        for place, axis in places:
            tensor = (states if place in plan.function.states else inputs)[place]
            declared = (dict(plan.function.states) | dict(plan.function.inputs))[place].shape[axis]
            size = sizes.setdefault(name, tensor.shape[axis])
            if size != tensor.shape[axis] or size < 1 or (declared != 1 and size > (declared or 0)):
                raise ElmExportError(
                    f"axis {axis} of {place!r} has {tensor.shape[axis]} entries; it takes as many as the other {name}, {'1 or more' if declared == 1 else f'from 1 to {declared}'}"
                )
    return sizes


def _static(name: str, kind: TensorType) -> list[int]:
    shape = [size for size in kind.shape if size is not None]
    if len(shape) != len(kind.shape):
        raise ElmExportError(f"state {name!r} has a shape that is not fixed, {list(kind.shape)}, which Core ML does not allow")
    return shape
