"""Formats of a sweep: the target of each with the settings that the plan gives it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmexport.errors import ElmExportError
from elmexport.sweep.models import existing_file
from elmexport.sweep.plan import FormatChoice
from elmexport.target import Target, find_target, options


@dataclass(frozen=True)
class SweepFormat:
    """A format of the plan; files among its settings have absolute paths."""

    choice: FormatChoice
    target: Target


def open_format(choice: FormatChoice, folder: Path, where: str) -> SweepFormat:
    """Make the target of a format of a plan that lies in `folder`; `where` is the plan's file.

    Raises:
        ElmExportError: no such format, or settings that its command does not take.
    """
    plain = find_target(choice.format)
    known = options(type(plain))
    settings: dict[str, Any] = {}
    for name, value in choice.settings.items():
        if name not in known:
            raise ElmExportError(f"{where}: {choice.format} has no option {name}; it has {', '.join(known) or 'none'}")
        default = getattr(plain, name)
        if known[name].metavar == "FILE":
            settings[name] = existing_file(str(value), name, folder, where)
        elif default is not None and type(value) is not type(default):
            raise ElmExportError(f"{where}: {name} of {choice.format} is {value!r}; its default is {default!r}, give a value like it")
        else:
            settings[name] = value
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return SweepFormat(FormatChoice(choice.format, shown), find_target(choice.format, settings))
