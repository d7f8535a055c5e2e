"""Frozen dataclasses to JSON and back, by their annotations; what does not fit is an error that says where.

Annotations understood: `str`, `int`, `float`, `bool`, dataclasses, `X | None`, `tuple[X, ...]`, `tuple[X, X]`, `Mapping[str, X]`, `Any`. A field
whose key in the document differs from its name says so in its metadata (`{"key": "from"}`). A class with a layout of its own in the
document has `to_document` and `from_document`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from elmexport.errors import ElmExportError


def encode(value: Any) -> Any:
    """`value` as JSON types. Every field is written, None as null."""
    if hasattr(value, "to_document"):
        return value.to_document()
    if is_dataclass(value):
        return {_key(field): encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [encode(entry) for entry in value]
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """JSON `value` as `kind`; `where` is its place, "report.json: tasks.arc_easy".

    Raises:
        ElmExportError: a missing key, or a value of another type; keys that no field is named by are ignored.
    """
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return decode(next(argument for argument in arguments if argument is not type(None)), value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is Mapping:
        expect(value, dict, where)
        return {key: decode(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if hasattr(kind, "from_document"):
        expect(value, dict, where)
        return kind.from_document(value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        expect(value, dict, where)
        return kind(**decode_fields(kind, value, where))
    return _decode_plain(kind, value, where)


def decode_fields(kind: Any, value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keyword arguments of the dataclass `kind` in the JSON object `value`.

    Raises:
        ElmExportError: as `decode`.
    """
    hints = _hints(kind)
    missing = [_key(field) for field in fields(kind) if _required(field) and _key(field) not in value]
    if missing:
        raise ElmExportError(f"{where} lacks {', '.join(missing)}; write the report again with this version of elmexport")
    present = [field for field in fields(kind) if _key(field) in value]
    return {field.name: decode(hints[field.name], value[_key(field)], f"{where}.{_key(field)}") for field in present}


def expect(value: Any, kind: type, where: str) -> None:
    """
    Raises:
        ElmExportError: `value` is no `kind`.
    """
    if not isinstance(value, kind):
        raise ElmExportError(f"{where} is {_brief(value)}, where {_NAMES[kind]} belongs; write the report again")


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    expect(value, list, where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(decode(arguments[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if len(value) != len(arguments):
        raise ElmExportError(f"{where} has {len(value)} entries, {len(arguments)} belong there; write the report again")
    return tuple(decode(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(arguments, value, strict=True)))


def _decode_plain(kind: type, value: Any, where: str) -> Any:
    if kind is float:
        # bool is an int to Python, and a JSON reader may have let NaN pass
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ElmExportError(f"{where} is {_brief(value)}, where a finite number belongs; write the report again")
        return float(value)
    if kind is int and isinstance(value, bool):
        raise ElmExportError(f"{where} is {_brief(value)}, where a whole number belongs; write the report again")
    expect(value, kind, where)
    return value


_NAMES: Mapping[type, str] = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false"}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _key(field: Any) -> str:
    return field.metadata.get("key", field.name)


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
