"""Execution plan of a function: steps over numbered slots, made once, so that running it touches neither names nor protobuf.

Operations over small constants are evaluated here. A `slice_update` of a state is done in place where the plan can prove that nobody can
tell: otherwise each layer of a language model would copy the whole cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.mil.constexpr import CONSTEXPR
from elmexport.mil.ops import MOVES, OPS, ParameterKind, parameters
from elmexport.mil.ops_movement import slice_update_
from elmexport.mil.program import Argument, BlobFileValue, ImmediateValue, MilFunction, Operation, ValueReference
from elmexport.mil.weights import Compressed, WeightStore, to_tensor

_SMALL = 1 << 16  # elements; constants up to this size are read while planning
FAILURES = (RuntimeError, IndexError, ValueError, TypeError)  # what torch raises where shapes, types or indices do not fit
_STATE_OPS = ("read_state", "write_state", "coreml_update_state")

Slot = int
AxisSizes = Mapping[str, int]  # of the axes of `DynamicAxes`, by their names
DynamicAxes = Mapping[str, Sequence[tuple[str, int]]]  # by a name: inputs or states and an axis of each, all of one size
# What a name stands for: a slot at run time, a constant that is read when needed, a tensor that the plan has, a string.
Value = Slot | BlobFileValue | Compressed | Tensor | str


@dataclass
class Step:
    """One operation to compute, or (`state` set) to read or write a state.

    `function` takes keyword arguments: constants from `fixed`, tensors from `slots`, Python values from the slots of `python`, lists of
    tensors from `lists`, constants that the weight store may have to decompress from `weights`. `rounds` says for each output whether it is
    rounded to fp16; slots in `frees` are not needed afterwards.
    """

    operation: Operation
    function: Callable[..., Any] | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    slots: tuple[tuple[str, Slot], ...] = ()
    python: tuple[tuple[str, Slot], ...] = ()
    lists: tuple[tuple[str, tuple[Slot | Tensor, ...]], ...] = ()
    weights: tuple[tuple[str, Callable[[], Tensor]], ...] = ()
    outputs: tuple[Slot, ...] = ()
    rounds: tuple[bool, ...] = ()
    frees: tuple[Slot, ...] = ()
    state: str | None = None
    write: Slot | Tensor | None = None  # what goes into `state`
    adjust: Callable[[dict[str, Any], AxisSizes], None] | None = None  # changes the arguments of a run on less than the full sizes

    def uses(self) -> set[Slot]:
        """The slots that the step reads."""
        used = {slot for _, slot in self.slots + self.python} | {e for _, entries in self.lists for e in entries if isinstance(e, int)}
        return used | ({self.write} if isinstance(self.write, int) else set())

    def has_constant_tensor(self) -> bool:
        """Whether a tensor that outlives the run is among the arguments."""
        entries = [entry for _, entries in self.lists for entry in entries]
        return bool(self.weights) or any(isinstance(entry, Tensor) for entry in [*self.fixed.values(), *entries])

    def is_constant(self) -> bool:
        return self.state is None and not self.weights and not self.uses()


@dataclass
class ExecutionPlan:
    """Execution plan of a function. `outputs` maps names to a slot, or a constant."""

    function: MilFunction
    inputs: dict[str, Slot]
    steps: list[Step] = field(default_factory=list)
    outputs: dict[str, Slot | Tensor] = field(default_factory=dict)
    slots: int = 0
    narrowed: DynamicAxes = field(default_factory=dict)  # axes that may be smaller; see `elmexport.mil.narrowing`

    def only(self, outputs: Collection[str]) -> ExecutionPlan:
        """Make the plan that computes `outputs` alone, without the steps that only others need."""
        kept = {name: value for name, value in self.outputs.items() if name in outputs}
        needed = {value for value in kept.values() if isinstance(value, int)}
        steps = []
        for step in reversed(self.steps):
            if (step.state is not None and step.write is not None) or needed & set(step.outputs):
                needed |= step.uses()
                steps.append(step)
        plan = replace(self, steps=[replace(step) for step in reversed(steps)], outputs=kept)
        _free_early(plan)
        return plan


def make_plan(function: MilFunction, store: WeightStore, *, round_fp16: bool) -> ExecutionPlan:
    """Make the execution plan of `function`.

    Raises:
        ElmExportError: an operation that is not known, or with arguments that it does not know.
    """
    return _Planner(function, store, round_fp16).plan()


class _Planner:
    def __init__(self, function: MilFunction, store: WeightStore, round_fp16: bool) -> None:
        self.function, self.store, self.round = function, store, round_fp16
        self.values: dict[str, Value] = {name: slot for slot, name in enumerate(function.inputs)}
        self.immediates: dict[str, ImmediateValue] = {}
        self.result = ExecutionPlan(function, {name: slot for slot, name in enumerate(function.inputs)}, slots=len(self.values))

    def plan(self) -> ExecutionPlan:
        for operation in self.function.operations:
            if operation.type == "const":
                self._add_constant(operation)
            elif operation.type in CONSTEXPR:
                self._add_compressed(operation)
            elif operation.type in _STATE_OPS:
                self._add_state(operation)
            elif operation.type in OPS:
                self._add(operation)
            else:
                raise ElmExportError(f"{self._label(operation)} is not known to this executor; known: {', '.join(sorted(OPS))}")
        for name in self.function.outputs:
            self.result.outputs[name] = self._tensor_or_slot(self._lookup(name))
        _free_early(self.result)
        _update_in_place(self.result)
        return self.result

    def _bind(self, operation: Operation, output: int, value: Value) -> None:
        self.values[operation.outputs[output][0]] = value

    def _new_slots(self, operation: Operation) -> tuple[Slot, ...]:
        slots = tuple(range(self.result.slots, self.result.slots + len(operation.outputs)))
        self.result.slots += len(slots)
        for i, slot in enumerate(slots):
            self._bind(operation, i, slot)
        return slots

    def _value(self, argument: Argument) -> Value:
        if isinstance(argument, ValueReference):
            return self._lookup(argument.name)
        if isinstance(argument, ImmediateValue):
            return argument.value if isinstance(argument.value, str) else to_tensor(argument.value)
        return argument

    def _lookup(self, name: str) -> Value:
        if name not in self.values:
            raise ElmExportError(f"function {self.function.name!r} uses {name!r}, which nothing defines; export the package again")
        return self.values[name]

    def _add_constant(self, operation: Operation) -> None:
        source = operation.arguments["val"][0]
        if isinstance(source, ImmediateValue):
            self.immediates[operation.outputs[0][0]] = source
        self._bind(operation, 0, self._value(source))

    def _tensor_or_slot(self, value: Value) -> Slot | Tensor:
        if isinstance(value, BlobFileValue | Compressed):
            return self.store.fetch(value)
        assert isinstance(value, int | Tensor), f"a tensor is needed, not {value!r}"
        return value

    def _add_compressed(self, operation: Operation) -> None:
        constants = {name: self._source(arguments[0]) for name, arguments in operation.arguments.items()}
        for i, (_, kind) in enumerate(operation.outputs):
            shape = tuple(size for size in kind.shape if size is not None)
            self._bind(operation, i, Compressed(operation.type, constants, i, shape, round=kind.dtype == "float16"))

    def _source(self, argument: Argument) -> BlobFileValue | ImmediateValue | Compressed:
        """A constant as it is stored, codes not yet widened."""
        if not isinstance(argument, ValueReference):
            return argument
        value = self._lookup(argument.name)
        if isinstance(value, BlobFileValue | Compressed):
            return value
        if argument.name in self.immediates:
            return self.immediates[argument.name]
        raise ElmExportError(f"function {self.function.name!r}: {argument.name!r} feeds a constexpr operation and is no constant")

    def _add_state(self, operation: Operation) -> None:
        parameter = "state" if operation.type == "coreml_update_state" else "input"
        (state,) = operation.arguments[parameter]
        assert isinstance(state, ValueReference)
        if operation.type != "read_state":
            data = operation.arguments["value" if operation.type == "coreml_update_state" else "data"][0]
            self.result.steps.append(Step(operation, state=state.name, write=self._tensor_or_slot(self._value(data))))
        if operation.outputs:
            self.result.steps.append(Step(operation, outputs=self._new_slots(operation), rounds=(False,), state=state.name))

    def _add(self, operation: Operation) -> None:
        step = self._bound(operation)
        if step.is_constant():
            results = self._evaluated(step)
            for i, (result, rounds) in enumerate(zip(results, step.rounds, strict=True)):
                self._bind(operation, i, result.half().float() if rounds else result)
            return
        step.outputs = self._new_slots(operation)
        self.result.steps.append(step)

    def _evaluated(self, step: Step) -> tuple[Tensor, ...]:
        assert step.function is not None
        try:
            results = step.function(**step.fixed)
        except FAILURES as error:
            raise ElmExportError(f"{self._label(step.operation)} failed: {error}") from error
        return results if isinstance(results, tuple) else (results,)

    def _label(self, operation: Operation) -> str:
        return f"operation {operation.type} ({operation.name!r} in function {self.function.name!r})"

    def _bound(self, operation: Operation) -> Step:
        known = parameters(operation.type)
        label = self._label(operation)
        if unknown := set(operation.arguments) - set(known):
            raise ElmExportError(
                f"{label} has arguments that this executor does not know: {', '.join(sorted(unknown))}; it knows {', '.join(known)}"
            )
        if missing := [name for name, (_, required) in known.items() if required and not operation.arguments.get(name)]:
            raise ElmExportError(f"{label} lacks {', '.join(missing)}")
        step = Step(operation, OPS[operation.type])
        step.rounds = tuple(self.round and kind.dtype == "float16" and operation.type not in MOVES for _, kind in operation.outputs)
        for name, arguments in operation.arguments.items():
            kind, _ = known[name]
            if kind is ParameterKind.TENSORS:
                entries = [self._tensor_or_slot(self._value(argument)) for argument in arguments]
                if any(isinstance(entry, int) for entry in entries):
                    step.lists += ((name, tuple(entries)),)
                else:
                    step.fixed[name] = entries
                continue
            value = self._value(arguments[0])
            if isinstance(value, int):
                if kind is ParameterKind.TENSOR:
                    step.slots += ((name, value),)
                else:
                    step.python += ((name, value),)
            elif isinstance(value, Compressed) or (
                isinstance(value, BlobFileValue) and kind is ParameterKind.TENSOR and _elements(value) > _SMALL
            ):
                step.weights += ((name, self.store.fetcher(value)),)
            else:
                tensor = self.store.fetch(value) if isinstance(value, BlobFileValue) else value
                step.fixed[name] = tensor.tolist() if kind is ParameterKind.PYTHON and isinstance(tensor, Tensor) else tensor
        return step


def _elements(blob: BlobFileValue) -> int:
    return torch.Size(blob.shape).numel()


def _free_early(plan: ExecutionPlan) -> None:
    """Give each slot up after its last use; outputs stay."""
    kept = {value for value in plan.outputs.values() if isinstance(value, int)}
    seen = set(kept)
    for step in reversed(plan.steps):
        last = {slot for slot in step.uses() | set(step.outputs) if slot not in seen}
        seen |= last
        step.frees = tuple(sorted(last))


def _update_in_place(plan: ExecutionPlan) -> None:
    """Let `slice_update` write into its input where that input is a state's memory (or memory of the function's own), is not used again,
    shares memory with no value that is, and the state, if it is one, is overwritten before it is next read."""
    roots: dict[Slot, frozenset[str]] = {slot: frozenset({_FOREIGN}) for slot in plan.inputs.values()}
    last = {slot: i for i, step in enumerate(plan.steps) for slot in step.uses() | set(step.outputs)}
    last |= {slot: len(plan.steps) for slot in plan.outputs.values() if isinstance(slot, int)}
    for i, step in enumerate(plan.steps):
        if step.state is not None:
            roots |= dict.fromkeys(step.outputs, frozenset({step.state}))
            continue
        if step.operation.type == "slice_update" and (source := dict(step.slots).get("x")) is not None:
            memory = roots[source]
            others = [slot for slot, at in last.items() if at > i and slot in roots and roots[slot] & memory] + [
                slot for slot in step.uses() - {source} if roots[slot] & memory
            ]
            if _FOREIGN not in memory and last[source] == i and not others and all(_overwritten(plan, state, i) for state in memory):
                step.function = slice_update_
                roots |= dict.fromkeys(step.outputs, memory)
                continue
        elif step.operation.type in MOVES:
            # May share memory with any of its inputs, constants included.
            memory = frozenset[str]().union(*(roots[slot] for slot in step.uses()))
            roots |= dict.fromkeys(step.outputs, memory | {_FOREIGN} if step.has_constant_tensor() else memory)
            continue
        roots |= {slot: frozenset({f"slot {slot}"}) for slot in step.outputs}


_FOREIGN = "memory of the caller or of a constant"


def _overwritten(plan: ExecutionPlan, root: str, after: int) -> bool:
    """Whether the state `root` is next touched, after step `after`, by a write; true for a root that is no state."""
    if root not in plan.function.states:
        return True
    touching = next((step for step in plan.steps[after + 1 :] if step.state == root), None)
    return touching is not None and touching.write is not None
