"""Task presets and published figures, of the model families' own tables, and the default task."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from typing import Any

from elmexport.errors import ElmExportError
from elmexport.models import families

DEFAULT_TASK = "cloze"  # needs no download


@cache
def _tables() -> Mapping[str, Any]:
    """By the preset's name: `fewshot` (tasks and their number of examples) and `published` (figures by model and task, per cent)."""
    tables: dict[str, Any] = {}
    for family in families():
        if family.published is not None:
            tables |= tomllib.loads(family.published.read_text(encoding="utf-8"))
    return tables


def preset(name: str) -> dict[str, int | None]:
    """The tasks of one of the published tables and their few-shot settings.

    Raises:
        ElmExportError: no such preset.
    """
    if name not in _tables():
        raise ElmExportError(f"no preset is called {name!r}; known: {', '.join(_tables())}")
    return dict(_tables()[name]["fewshot"])


def published(model: str, task: str, fewshot: int) -> float | None:
    """The published figure for a model, per cent; None where no table has this task with so many examples."""
    for table in _tables().values():
        if table["fewshot"].get(task) == fewshot and task in table["published"].get(model, {}):
            return float(table["published"][model][task])
    return None


def chosen_tasks(names: str | None, preset_name: str | None, fewshot: int | None) -> dict[str, int | None]:
    """Tasks and few-shot settings of what a user asked for: names with commas ("none": no task at all), a preset, or both.

    Raises:
        ElmExportError: an unknown or repeated name, a task that is not of the preset, or few-shot examples against the preset's.
    """
    if preset_name is not None and fewshot is not None:
        raise ElmExportError(f"the preset {preset_name} sets the few-shot examples itself; leave out --fewshot, or name --tasks instead")
    if names == "none" and preset_name is None:
        return {}
    asked = [name.strip() for name in names.split(",")] if names is not None else None
    if asked is not None and (not all(asked) or len(set(asked)) < len(asked)):
        raise ElmExportError(f"--tasks {names!r} names a task twice or not at all; give different names with commas between them")
    if preset_name is None:
        return dict.fromkeys(asked or [DEFAULT_TASK], fewshot)
    table = preset(preset_name)
    foreign = [name for name in asked or () if name not in table]
    if foreign:
        raise ElmExportError(f"the preset {preset_name} has no {', '.join(foreign)}; its tasks are {', '.join(table)}")
    return {name: shots for name, shots in table.items() if asked is None or name in asked}
