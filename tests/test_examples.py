"""The workflow examples: YAML, every action pinned to a commit, every command one that elmexport would take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from elmexport.cli.main import app

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.yml"))


def steps(path: Path) -> list[dict[str, Any]]:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_actions_are_pinned(path: Path) -> None:
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_commands_are_understood(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    # one value of the matrix stands for all
    lines = [re.sub(r"\$\{\{ matrix\.quant \}\}", "int4", step.get("run", "")) for step in steps(path)]
    commands = [shlex.split(line) for line in lines if line.startswith("elmexport ")]
    assert {words[1] for words in commands} >= {"eval"}
    for _, name, *arguments in commands:
        group.get_command(None, name).make_context(name, arguments)  # parses; runs nothing
