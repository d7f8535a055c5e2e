"""Options that only one target's command has: one row for each field of the target's class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

# By target: the field's name, its annotation as typer reads it, its default. A test holds the rows and the targets' fields together.
OPTIONS: Mapping[str, tuple[tuple[str, Any, Any], ...]] = {
    "onnx": (),
    "coreml": (),
    "gguf": (),
}


def target_options(target: str) -> list[inspect.Parameter]:
    """The parameters that the command of `target` has beyond those of every target."""
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation, default in OPTIONS[target]
    ]
