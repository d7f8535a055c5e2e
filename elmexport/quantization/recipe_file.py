"""Recipe files: the TOML that `load_recipe` reads, written for a user to look at, edit and use again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elmexport.quantization.recipes import Recipe


def write_recipe(recipe: Recipe, path: Path, comment: str) -> None:
    """Write `recipe` to `path`, `comment` (one line) at its head."""
    data = recipe.to_dict()
    rules: list[dict[str, Any]] = data.pop("rule")
    lines = [f"# {comment}", *(f"{key} = {_toml(value)}" for key, value in data.items())]
    for rule in rules:
        keys = [key for key in ("roles", "layers", "min_gqa", "experts", "scheme") if key in rule]
        lines += ["", "[[rule]]", *(f"{key} = {_toml(rule[key])}" for key in keys)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: Any) -> str:
    """Strings, numbers and lists of strings are written alike in JSON and TOML."""
    return json.dumps(value, ensure_ascii=False)
