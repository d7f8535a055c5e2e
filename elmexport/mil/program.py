"""A Core ML package (`.mlpackage` with an mlprogram) as plain data: functions, their operations, constants by reference.

Constants in the weight file stay there (`BlobFileValue`) until something asks for them. Not covered: nested blocks (`cond`, `while_loop`),
dictionary and list values, model types other than an mlprogram.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmexport.documents import decode_json
from elmexport.errors import ElmExportError
from elmexport.mil.blob import BlobFile, unpack
from elmexport.mil.coremltools_import import quiet_coremltools

_MODEL_PATH = "@model_path/"


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of a tensor.

    `dtype` is as MIL names it, in lower case ("float16", "uint4", "bool", "string"); None in `shape` is a dimension known at run time.
    """

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class BlobFileValue:
    """A constant in a weight file."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ImmediateValue:
    """A constant in the program itself: an array (rank 0 for a number), or a string."""

    value: NDArray[Any] | str


@dataclass(frozen=True)
class ValueReference:
    """A use of a value, by its name."""

    name: str


Argument = BlobFileValue | ImmediateValue | ValueReference


@dataclass(frozen=True)
class Operation:
    """One operation. `arguments` holds inputs and, where an older operation keeps them so, attributes; each is a tuple, mostly of one."""

    type: str
    name: str
    arguments: Mapping[str, tuple[Argument, ...]]
    outputs: tuple[tuple[str, TensorType], ...]


@dataclass(frozen=True)
class MilFunction:
    """A function: `inputs` and `states` map names to types; `outputs` are names of values."""

    name: str
    inputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    def output_types(self) -> dict[str, TensorType]:
        """The type of each output."""
        types = self.types()
        return {name: types[name] for name in self.outputs}

    def types(self) -> dict[str, TensorType]:
        """The type of every value, by its name."""
        return {name: kind for operation in self.operations for name, kind in operation.outputs} | dict(self.inputs) | dict(self.states)


@dataclass(frozen=True)
class Program:
    """A program: functions by name, weight files, and what its maker says of it (the specification's user-defined metadata)."""

    path: Path
    functions: Mapping[str, MilFunction]
    default_function: str
    files: Mapping[Path, BlobFile]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def function(self, name: str | None = None) -> MilFunction:
        """The function called `name`, or the default one.

        Raises:
            ElmExportError: no such function.
        """
        name = self.default_function if name is None else name
        if name not in self.functions:
            raise ElmExportError(f"{self.path} has no function {name!r}; it has {', '.join(self.functions)}")
        return self.functions[name]


def load_program(path: Path) -> Program:
    """Read the package at `path`; every constant's place in the weight file is checked, none is read.

    Raises:
        ElmExportError: not a package, a damaged one, or one without an mlprogram.
    """
    specification_path = _specification_path(path)
    specification = _parse(specification_path)
    kind = specification.WhichOneof("Type")
    if kind is None:
        raise _damaged(path, f"{specification_path.name} holds no model")
    if kind != "mlProgram":
        raise ElmExportError(
            f"{path} holds a model of type {kind}, only mlProgram can be run here; convert it with coremltools and convert_to='mlprogram'"
        )
    if not specification.mlProgram.functions:
        raise _damaged(path, f"{specification_path.name} holds no function")
    reader = _Reader(path, specification_path.parent)
    try:
        functions = {name: reader.function(name, function) for name, function in sorted(specification.mlProgram.functions.items())}
    except (KeyError, IndexError, TypeError, ValueError) as error:  # of a TypeError: names that are no UTF-8, which protobuf gives as bytes
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    default = specification.description.defaultFunctionName or "main"
    default = default if default in functions else next(iter(functions))
    return Program(path, functions, default, reader.files, dict(specification.description.metadata.userDefined))


def _specification_path(path: Path) -> Path:
    manifest = path / "Manifest.json"
    if not manifest.is_file():
        raise ElmExportError(f"{path} is not a Core ML package: it has no Manifest.json; give the .mlpackage folder that an export wrote")
    try:
        content = decode_json(manifest.read_bytes())
        root = path / "Data" / _inside(content["itemInfoEntries"][content["rootModelIdentifier"]]["path"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"Manifest.json: {type(error).__name__} {error}") from None
    if not root.is_file():
        raise _damaged(path, f"{root.relative_to(path)} is missing")
    return root


def _inside(name: str) -> str:
    """`name`, a path in a package.

    Raises:
        ValueError: it leads out of it.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise ValueError(f"the path {name!r} leads out of the package")
    return name


def _parse(path: Path) -> Any:
    with quiet_coremltools():
        from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    specification = Model_pb2.Model()
    try:
        specification.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise _damaged(path, str(error)) from None
    return specification


def _damaged(path: Path, reason: str) -> ElmExportError:
    return ElmExportError(f"{path} is damaged ({reason}); copy the package again or export it again")


class _Reader:
    """Turns the protobuf messages of one package into the classes above."""

    def __init__(self, package: Path, model_folder: Path) -> None:
        from coremltools.proto import MIL_pb2

        self.package, self.model_folder = package, model_folder
        self.files: dict[Path, BlobFile] = {}
        self._dtypes = {number: name.lower() for name, number in MIL_pb2.DataType.items()}

    def function(self, name: str, message: Any) -> MilFunction:
        block = message.block_specializations[message.opset]
        inputs, states = {}, {}
        for argument in message.inputs:
            if argument.type.WhichOneof("type") == "stateType":
                states[argument.name] = self._type(argument.type.stateType.wrappedType)
            else:
                inputs[argument.name] = self._type(argument.type)
        operations = tuple(self._operations(block.operations))
        return MilFunction(name, inputs, states, tuple(block.outputs), operations)

    def _operations(self, messages: Any) -> Iterator[Operation]:
        for message in messages:
            name = message.attributes["name"].immediateValue.tensor.strings.values[0] if "name" in message.attributes else ""
            if message.blocks:
                raise ElmExportError(
                    f"{self.package}: operation {message.type} ({name!r}) has nested blocks, which this executor does not run"
                )
            arguments = {key: tuple(map(self._argument, value.arguments)) for key, value in message.inputs.items()}
            arguments |= {key: (self._constant(value),) for key, value in message.attributes.items() if key != "name"}
            yield Operation(message.type, name, arguments, tuple((output.name, self._type(output.type)) for output in message.outputs))

    def _argument(self, binding: Any) -> Argument:
        return ValueReference(binding.name) if binding.WhichOneof("binding") == "name" else self._constant(binding.value)

    def _type(self, message: Any) -> TensorType:
        if message.WhichOneof("type") != "tensorType":
            raise ElmExportError(
                f"{self.package}: values of kind {message.WhichOneof('type')} are not supported; this executor runs tensors"
            )
        kind = message.tensorType
        shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in kind.dimensions)
        return TensorType(self._dtypes[kind.dataType], shape)

    def _constant(self, message: Any) -> BlobFileValue | ImmediateValue:
        kind = self._type(message.type)
        shape = tuple(size for size in kind.shape if size is not None)
        if message.WhichOneof("value") == "blobFileValue":
            name = message.blobFileValue.fileName
            path = self.model_folder / _inside(name.removeprefix(_MODEL_PATH))
            if path not in self.files:
                self.files[path] = BlobFile(path)
            self.files[path].check(message.blobFileValue.offset, kind.dtype, shape)
            return BlobFileValue(path, message.blobFileValue.offset, kind.dtype, shape)
        tensor = message.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if kind.dtype == "string":
            return ImmediateValue(tensor.strings.values[0])
        if field == "bytes":
            return ImmediateValue(_from_bytes(tensor.bytes.values, kind.dtype, shape))
        values = getattr(tensor, field).values if field else []
        return ImmediateValue(np.array(values, _IMMEDIATE_DTYPES[kind.dtype]).reshape(shape))


_IMMEDIATE_DTYPES = {
    "float32": "f4",
    "float16": "f2",
    "int32": "i4",
    "bool": "?",
    "int64": "i8",
    "float64": "f8",
    "int16": "i2",
    "uint16": "u2",
}


def _from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    bits = int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))
    if bits < 8:
        return unpack(np.frombuffer(data, np.uint8), bits, prod(shape), signed=dtype.startswith("int")).reshape(shape)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape).copy()
