"""Dynamic axes for a function of fixed sizes: runs on fewer tokens than its input has, on a cache cut off behind them.

An axis of an input or state is followed through every operation, forwards and backwards: what is added to it, indexed with it or summed
over it has the same axis. Where that axis reaches a constant, a run takes the constant's first part; where it stands in a `reshape`, the
smaller size. All other operations follow their inputs. An axis that meets an operation that has no rule here, or one that depends on its
size (it is split or used as channels), cannot be narrowed, and `narrow` says so. Where axes are joined, the result is their sum, and may
meet only other such sums. An axis of length one may also be made longer, by the same rules: what uses one entry then uses several.

That the smaller run gives the same results is a property of the model (it is causal, or treats rows alone), not of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from elmexport.mil import ops_elementwise
from elmexport.mil.plan import AxisSizes, DynamicAxes, ExecutionPlan, Step


class CannotNarrowError(Exception):
    """An axis cannot be made dynamic: it meets something that needs its full size; the message says what."""


@dataclass(eq=False)
class _Factor:
    """A size that some axes have in common (a node of a union-find forest).

    After `union`, `parent` stands for it. `fixed` says why it cannot change. `parts` are the axes whose sum it is.
    """

    size: int
    parent: _Factor | None = None
    fixed: str | None = None
    parts: tuple[Axis, ...] = ()

    def root(self) -> _Factor:
        node = self
        while node.parent is not None:
            node = node.parent
        return node


Axis = tuple[_Factor, ...]  # the product of its factors, outer to inner; () is an axis of length one
ArgumentPlace = tuple[str, int | None]  # name, and place in a list of tensors


@dataclass(frozen=True)
class _Adjustment:
    """Change of a step's arguments in a run on less: `constants` are cut to a size along an axis, entries of `shape` are computed anew."""

    constants: tuple[tuple[ArgumentPlace, int, str], ...] = ()
    shape: tuple[tuple[int, int, tuple[str, ...]], ...] = ()  # place, product of what stays, names of what does not

    def __call__(self, arguments: dict[str, Any], sizes: AxisSizes) -> None:
        for (name, place), axis, size in self.constants:
            if place is None:
                arguments[name] = arguments[name].narrow(axis, 0, sizes[size])
            else:
                entries = list(arguments[name])
                entries[place] = entries[place].narrow(axis, 0, sizes[size])
                arguments[name] = entries
        if self.shape:
            shape = list(arguments["shape"])
            for place, rest, names in self.shape:
                shape[place] = rest * prod(sizes[name] for name in names)
            arguments["shape"] = shape


def narrow(plan: ExecutionPlan, axes: DynamicAxes) -> ExecutionPlan:
    """Make a plan that can run with smaller `axes`.

    Raises:
        CannotNarrowError: an axis is needed in full, or places of one name are not bound to be equal, or those of two names are.
    """
    return _AxisTracker(plan, axes).narrowed(axes)


class _AxisTracker:
    """Follows axes through the steps of a plan; each operation's rule says which axes of its inputs and outputs are the same."""

    def __init__(self, plan: ExecutionPlan, axes: DynamicAxes) -> None:
        self.plan = plan
        function = plan.function
        self.slots = {slot: self._fresh(function.inputs[name].shape) for name, slot in plan.inputs.items()}
        self.states = {name: self._fresh(kind.shape) for name, kind in function.states.items()}
        for value, axis in (place for places in axes.values() for place in places):
            found = self._place(value)
            found[axis] = found[axis] or (_Factor(1),)  # one that may become longer
        self.constants: dict[int, dict[ArgumentPlace, list[Axis]]] = {}
        self.shapes: dict[int, list[Axis]] = {}

    def narrowed(self, axes: DynamicAxes) -> ExecutionPlan:
        for index, step in enumerate(self.plan.steps):
            self._follow(index, step)
        names: dict[_Factor, str] = {}
        for name, places in axes.items():
            for value, axis in places:
                for factor in self._place(value)[axis]:
                    root = factor.root()
                    if root.fixed is not None:
                        raise CannotNarrowError(f"axis {axis} of {value} is needed in full: {root.fixed}")
                    if names.setdefault(root, name) != name:
                        raise CannotNarrowError(f"{names[root]} and {name} are one size")
            if len({factor.root() for factor in names if names[factor] == name}) > 1:
                raise CannotNarrowError(f"the places of {name} are sizes of their own")
        steps = [replace(step, adjust=self._adjustment(index, names)) for index, step in enumerate(self.plan.steps)]
        return replace(self.plan, steps=steps, narrowed=axes)

    def _place(self, value: str) -> list[Axis]:
        """The axes of an input or state."""
        return self.states[value] if value in self.states else self.slots[self.plan.inputs[value]]

    def _adjustment(self, index: int, names: Mapping[_Factor, str]) -> _Adjustment | None:
        constants = []
        for argument, axes in self.constants.get(index, {}).items():
            for axis, factors in enumerate(axes):
                found = [names[factor.root()] for factor in factors if factor.root() in names]
                if found and len(factors) > 1:
                    raise CannotNarrowError(f"a constant of {self.plan.steps[index].operation.name} repeats {found[0]}")
                constants += [(argument, axis, name) for name in found]
        shape = []
        for place, factors in enumerate(self.shapes.get(index, ())):
            found = [names[factor.root()] for factor in factors if factor.root() in names]
            if found:
                shape.append((place, prod(factor.size for factor in factors if factor.root() not in names), tuple(found)))
        return _Adjustment(tuple(constants), tuple(shape)) if constants or shape else None

    def _fresh(self, shape: Sequence[int | None], fixed: str | None = None) -> list[Axis]:
        if None in shape:
            raise CannotNarrowError("a size is not fixed")
        return [() if size == 1 else (_Factor(size, fixed=fixed),) for size in shape if size is not None]

    def _fix(self, axis: Axis, reason: str) -> None:
        for factor in axis:
            root = factor.root()
            root.fixed = reason
            for part in root.parts:
                self._fix(part, reason)

    def _unify(self, a: Axis, b: Axis, reason: str) -> None:
        if [factor.size for factor in a] != [factor.size for factor in b]:
            self._fix(a + b, reason)
            return
        for one, other in zip(a, b, strict=True):
            one, other = one.root(), other.root()
            if one is other:
                continue
            if len(one.parts) != len(other.parts):
                self._fix((one, other), reason)
            for part, match in zip(one.parts, other.parts, strict=False):
                self._unify(part, match, reason)
            one.parent, other.fixed = other, other.fixed or one.fixed

    def _follow(self, index: int, step: Step) -> None:
        if step.state is not None:
            if isinstance(step.write, int):
                self._broadcast([self.slots[step.write], self.states[step.state]], step.operation.name)
            elif step.write is not None:
                raise CannotNarrowError(f"a constant is written to {step.state}")
            for slot in step.outputs:
                self.slots[slot] = self.states[step.state]
            return
        rule = _RULES.get(step.operation.type)
        if rule is None:
            for slot in step.uses():
                for axis in self.slots[slot]:
                    self._fix(axis, f"by {step.operation.type} ({step.operation.name})")
            outputs = [self._fresh(kind.shape, f"it comes from {step.operation.name}") for _, kind in step.operation.outputs]
        else:
            outputs = rule(self, index, step)
        for slot, axes in zip(step.outputs, outputs, strict=True):
            self.slots[slot] = axes

    def _argument(self, index: int, step: Step, name: str, place: int | None = None) -> list[Axis]:
        """The axes of a tensor argument; constants get axes of their own."""
        value: Any = dict(step.slots).get(name) if place is None else dict(step.lists)[name][place]
        if value is None:
            value = step.fixed.get(name)
        if isinstance(value, int):
            return self.slots[value]
        if not isinstance(value, torch.Tensor):
            raise CannotNarrowError(f"{name} of {step.operation.name} is a weight")
        return self.constants.setdefault(index, {}).setdefault((name, place), self._fresh(value.shape))

    def _broadcast(self, operands: Sequence[list[Axis]], name: str) -> list[Axis]:
        result: list[Axis] = []
        for place in range(1, max(map(len, operands)) + 1):
            axes = [axes[-place] for axes in operands if place <= len(axes) and axes[-place]]
            for axis in axes[1:]:
                self._unify(axes[0], axis, f"by the shapes of {name}")
            result.append(axes[0] if axes else ())
        return result[::-1]

    def elementwise(self, index: int, step: Step) -> list[list[Axis]]:
        if step.weights:
            raise CannotNarrowError(f"{step.operation.name} takes a large constant")
        names = [name for name, _ in step.slots] + [name for name, value in step.fixed.items() if isinstance(value, Tensor)]
        return [self._broadcast([self._argument(index, step, name) for name in names], step.operation.name)]

    def reduction(self, index: int, step: Step) -> list[list[Axis]]:
        axes = self._argument(index, step, "x")
        over = [step.fixed.get("axis", -1)] if step.operation.type == "reduce_argmax" else step.fixed.get("axes")
        gone = {axis % len(axes) for axis in (range(len(axes)) if over is None else over)}
        for axis in gone:  # a mean over fewer values is another mean
            self._fix(axes[axis], f"it is reduced by {step.operation.name}")
        kept = step.fixed.get("keep_dims", False)
        return [[() if i in gone else axis for i, axis in enumerate(axes) if kept or i not in gone]]

    def reshape(self, index: int, step: Step) -> list[list[Axis]]:
        left = []
        for factor in (factor for axis in self._argument(index, step, "x") for factor in axis):
            if factor.size == 1 or factor.root().parts:
                self._fix((factor,), f"it goes through {step.operation.name}")
            if factor.size > 1:
                left.append(factor)
        result: list[Axis] = []
        for size in _output_shape(step):
            axis: Axis = ()
            while (product := _size(axis)) < size:
                factor = left.pop(0)
                if size % (product * factor.size):
                    reason = f"it is taken apart by {step.operation.name}"
                    self._fix((factor,), reason)
                    if (product * factor.size) % size:
                        raise CannotNarrowError(f"the shapes of {step.operation.name} have no common factors")
                    part = size // product
                    left.insert(0, _Factor(factor.size // part, fixed=reason))
                    factor = _Factor(part, fixed=reason)
                axis += (factor,)
            result.append(axis)
        self.shapes[index] = [() if entry in (0, -1) else axis for entry, axis in zip(step.fixed["shape"], result, strict=True)]
        return [result]

    def transpose(self, index: int, step: Step) -> list[list[Axis]]:
        axes = self._argument(index, step, "x")
        return [[axes[axis] for axis in step.fixed["perm"]]]

    def squeeze(self, index: int, step: Step) -> list[list[Axis]]:
        axes = self._argument(index, step, "x")
        gone = {axis % len(axes) for axis in step.fixed["axes"]}
        for axis in gone:
            self._fix(axes[axis], f"{step.operation.name} removes it")
        return [[axis for i, axis in enumerate(axes) if i not in gone]]

    def concat(self, index: int, step: Step) -> list[list[Axis]]:
        ((name, entries),) = step.lists
        operands = [self._argument(index, step, name, place) for place in range(len(entries))]
        along = step.fixed["axis"] % len(operands[0])
        result = self._broadcast([[() if i == along else axis for i, axis in enumerate(axes)] for axes in operands], step.operation.name)
        if all(isinstance(entry, int) and entry == entries[0] for entry in entries):
            result[along] = (_Factor(len(entries), fixed="it counts repetitions"), *operands[0][along])
            return [result]
        parts = tuple(axes[along] for axes in operands)
        result[along] = (_Factor(_output_shape(step)[along], parts=parts),)
        return [result]

    def split(self, index: int, step: Step) -> list[list[Axis]]:
        axes = self._argument(index, step, "x")
        along = step.fixed["axis"] % len(axes)
        reason = f"it is split by {step.operation.name}"
        self._fix(axes[along], reason)
        parts = [kind.shape[along] for _, kind in step.operation.outputs]
        return [[*axes[:along], *self._fresh([part], reason), *axes[along + 1 :]] for part in parts]

    def slice_by_index(self, index: int, step: Step) -> list[list[Axis]]:
        """An axis that is taken whole stays; Python's slices end where the values do."""
        axes, shape = self._argument(index, step, "x"), _output_shape(step)
        if any(step.fixed.get("squeeze_mask") or ()) or any(stride != 1 for stride in step.fixed.get("stride") or ()):
            raise CannotNarrowError(f"{step.operation.name} takes single elements or steps")
        result = []
        for axis, size in zip(axes, shape, strict=True):
            if _size(axis) == size > 1:
                result.append(axis)
            else:
                reason = f"{step.operation.name} takes a part of it"
                self._fix(axis, reason)
                result += self._fresh([size], reason)
        return [result]

    def slice_update(self, index: int, step: Step) -> list[list[Axis]]:
        """An axis that is overwritten whole is common to both; where a part is, the part ends with the values at the latest."""
        axes, update = self._argument(index, step, "x"), self._argument(index, step, "update")
        for axis, other in zip(axes, update, strict=True):
            if [factor.size for factor in axis] == [factor.size for factor in other]:
                self._unify(axis, other, step.operation.name)
        return [axes]

    def gather(self, index: int, step: Step) -> list[list[Axis]]:
        indices = self._argument(index, step, "indices")
        along, shape = step.fixed.get("axis", 0), _output_shape(step)
        if step.fixed.get("batch_dims") or along < 0:
            raise CannotNarrowError(f"{step.operation.name} gathers in batches")
        reason = f"{step.operation.name} picks from it"
        for axis in self.slots[dict(step.slots)["x"]] if "x" in dict(step.slots) else ():
            self._fix(axis, reason)
        return [
            [indices[i - along] if along <= i < along + len(indices) else self._fresh([size], reason)[0] for i, size in enumerate(shape)]
        ]

    def conv(self, index: int, step: Step) -> list[list[Axis]]:
        """A 1x1 convolution treats places alone."""
        axes, shape = self._argument(index, step, "x"), _output_shape(step)
        reason = f"{step.operation.name} is a convolution over it"
        unpadded = step.fixed.get("pad_type", "valid") == "valid" and prod(step.fixed.get("strides") or [1]) == 1
        if not unpadded or shape[2:] != [_size(axis) for axis in axes[2:]]:  # without padding, the kernel is 1x1 if the sizes stay
            for axis in axes:
                self._fix(axis, reason)
            return [self._fresh(shape, reason)]
        self._fix(axes[1], reason)
        return [[axes[0], *self._fresh([shape[1]], reason), *axes[2:]]]

    def matmul(self, index: int, step: Step) -> list[list[Axis]]:
        x, y = self._argument(index, step, "x"), self._argument(index, step, "y")
        *batch_x, rows, inner = [*x[:-2], x[-1], x[-2]] if step.fixed.get("transpose_x") else x
        *batch_y, inner_y, columns = [*y[:-2], y[-1], y[-2]] if step.fixed.get("transpose_y") else y
        self._unify(inner, inner_y, f"by the shapes of {step.operation.name}")
        return [[*self._broadcast([batch_x, batch_y], step.operation.name), rows, columns]]


def _output_shape(step: Step) -> list[int]:
    return [size for size in step.operation.outputs[0][1].shape if size is not None]


def _size(axis: Axis) -> int:
    return prod(factor.size for factor in axis)


_Rule = Callable[[_AxisTracker, int, Step], list[list[Axis]]]

_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(set(ops_elementwise.OPS) - {"prelu", "softplus_parametric", "range_1d"}, _AxisTracker.elementwise),
    **dict.fromkeys(("reduce_argmax", "reduce_max", "reduce_mean", "reduce_min", "reduce_sum"), _AxisTracker.reduction),
    "concat": _AxisTracker.concat,
    "conv": _AxisTracker.conv,
    "gather": _AxisTracker.gather,
    "matmul": _AxisTracker.matmul,
    "reshape": _AxisTracker.reshape,
    "slice_by_index": _AxisTracker.slice_by_index,
    "slice_update": _AxisTracker.slice_update,
    "split": _AxisTracker.split,
    "squeeze": _AxisTracker.squeeze,
    "transpose": _AxisTracker.transpose,
}
