"""Command-line options of one target: one for each field of the target's class that is marked as one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from enum import Enum, StrEnum
from typing import Annotated, Any, get_type_hints

import typer

from elmexport.target import Option, Target, options

FORMAT = "Format"  # heading of these options on a help page
_ENUMERATION: Any = StrEnum  # mypy wants literals where it is called by its name


def target_options(kind: type[Target]) -> list[inspect.Parameter]:
    """List the parameters that the command of the target `kind` has beyond those of every target."""
    if not is_dataclass(kind):
        return []
    marked, types = options(kind), get_type_hints(kind)
    return [_parameter(field, types[field.name], marked[field.name]) for field in fields(kind) if field.name in marked]


def setting_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what typer read into settings of a target."""
    return {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}


def _parameter(field: Field[Any], kind: Any, option: Option) -> inspect.Parameter:
    default = field.default
    flags = (f"--{field.name.replace('_', '-')}",) if kind is bool else ()  # without them typer adds a --no- form
    if option.choices is not None:  # typer takes choices as an enumeration
        kind = _ENUMERATION(field.name, {choice: choice for choice in option.choices})
        default = kind(default)
    annotation = Annotated[kind, typer.Option(*flags, metavar=option.metavar, help=option.help, rich_help_panel=FORMAT)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
