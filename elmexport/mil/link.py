"""Linking of programs that run one after another into one: outputs of a function go to the function of that name in the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from elmexport.errors import ElmExportError
from elmexport.mil.program import Argument, MilFunction, Operation, Program, TensorType, ValueReference


def link(programs: Sequence[Program], path: Path, connections: Mapping[str, str], own: Collection[str] = ()) -> Program:
    """Link `programs`, which all have the same functions, into one; `path` stands for it in messages.

    `connections` maps an output to the input of the next program that takes it. Other inputs of one name are one input, and outputs keep their
    names. States, and the inputs and outputs in `own`, belong to one program each: program i's are called `name.i`.

    Raises:
        ElmExportError: programs with other functions than the first, an input of two types, a connection that one side lacks or declares as
            another type, an output of two programs.
    """
    first = programs[0]
    for program in programs[1:]:
        if set(program.functions) != set(first.functions):
            raise ElmExportError(
                f"{program.path} has the functions {', '.join(program.functions)}, and {first.path}, which runs before it, "
                f"{', '.join(first.functions)}: they do not belong together"
            )
    functions = {}
    for name in first.functions:
        linked = _Linked(name, connections, own)
        for program in programs:
            linked.add(program.functions[name], program.path)
        functions[name] = linked.function()
    files = {path: file for program in programs for path, file in program.files.items()}
    return Program(path, functions, first.default_function, files, first.metadata)


class _Linked:
    """A function under construction, to which each program's is added."""

    def __init__(self, name: str, connections: Mapping[str, str], own: Collection[str]) -> None:
        self.name, self.connections, self.own = name, connections, own
        self.count = 0
        self.inputs: dict[str, TensorType] = {}
        self.states: dict[str, TensorType] = {}
        self.outputs: list[str] = []
        self.operations: list[Operation] = []
        self.open: dict[str, tuple[str, TensorType]] = {}  # what the next program must take: input, value and type of it

    def add(self, function: MilFunction, path: Path) -> None:
        names: dict[str, str] = {}  # of this program's values, in the linked function
        for name, kind in function.inputs.items():
            if name in self.open:
                names[name], given = self.open.pop(name)
                if given != kind:
                    raise self._mismatch(path, f"takes {name} as {_words(kind)}, and the package before it gives {_words(given)}")
            elif name in self.connections.values():
                raise self._mismatch(path, f"takes {name}, which no package before it gives")
            else:
                names[name] = self._outer(name)
                if self.inputs.setdefault(names[name], kind) != kind:
                    raise self._mismatch(path, f"takes {name} as {_words(kind)}, and another package as {_words(self.inputs[names[name]])}")
        if self.open:
            raise self._mismatch(path, f"does not take {', '.join(self.open)}, which the package before it gives")
        for name, kind in function.states.items():
            names[name] = f"{name}.{self.count}"
            self.states[names[name]] = kind
        types = function.output_types()
        for name in function.outputs:
            if name in self.connections:
                self.open[self.connections[name]] = f"{name}.{self.count}", types[name]
                continue
            names[name] = self._outer(name)
            if names[name] in self.outputs:
                raise self._mismatch(path, f"gives {name}, as a package before it does")
            self.outputs.append(names[name])

        def renamed(argument: Argument) -> Argument:
            return ValueReference(renamed_value(argument.name)) if isinstance(argument, ValueReference) else argument

        def renamed_value(name: str) -> str:
            return names.get(name, f"{name}.{self.count}")

        for operation in function.operations:
            arguments = {key: tuple(map(renamed, given)) for key, given in operation.arguments.items()}
            outputs = tuple((renamed_value(name), kind) for name, kind in operation.outputs)
            self.operations.append(replace(operation, arguments=arguments, outputs=outputs))
        self.count += 1

    def function(self) -> MilFunction:
        if self.open:
            raise ElmExportError(f"{', '.join(self.open)} in function {self.name!r} is given by the last package, and none takes it")
        return MilFunction(self.name, self.inputs, self.states, tuple(self.outputs), tuple(self.operations))

    def _outer(self, name: str) -> str:
        return f"{name}.{self.count}" if name in self.own else name

    def _mismatch(self, path: Path, what: str) -> ElmExportError:
        return ElmExportError(f"{path} does not belong into this chain: its function {self.name!r} {what}")


def _words(kind: TensorType) -> str:
    return f"{kind.dtype} {list(kind.shape)}"
