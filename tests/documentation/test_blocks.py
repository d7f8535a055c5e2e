"""Every code block of README and docs does what it says: commands and programs are executed, page by page, each page in a folder of its own.

What `blocks.py` says about marks holds here: a block that is not executed gives its reason, and is parsed all the same.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
import yaml

import elmexport
from elmexport.cli.main import app, main
from tests.documentation.blocks import EXECUTED, LANGUAGES, ROOT, Block, blocks, elmexport_arguments, parse
from tests.documentation.syntax import syntax_error

PLACES = ("*.md", "benchmarks/*.md", "examples/*.md", "examples/*/*.md", "docs/**/*.md")
PAGES = tuple(sorted(path for place in PLACES for path in ROOT.glob(place)))
BLOCKS = tuple(block for page in PAGES for block in blocks(page))
RUN = tuple(page for page in PAGES if any(block.language in EXECUTED and block.not_run is None for block in blocks(page)))


def _named(value: Any) -> str:
    return value.where if isinstance(value, Block) else value.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What commands see: `elmexport` on the path, a cache that all pages share."""
    folder = tmp_path_factory.mktemp("documentation")
    script = folder / "bin" / "elmexport"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m elmexport "$@"\n')
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    package = str(Path(elmexport.__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELMEXPORT_CACHE", str(folder / "cache"))
        yield os.environ | {"PATH": path, "PYTHONPATH": package, "ELMEXPORT_CACHE": str(folder / "cache")}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=_named)
def test_blocks_run(
    page: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.with_tiny, encoding="utf-8")
        if block.not_run is not None:
            continue
        if block.language == "python":
            exec(compile(block.with_tiny, block.where, "exec"), {"__name__": "__main__"})
        if block.language == "bash":
            installs = "install" in block.marks
            folder = tmp_path / "installed" if installs else tmp_path  # the page's own blocks find none of its artifacts
            folder.mkdir(exist_ok=True)
            for command in block.commands():
                capfd.readouterr()
                code = run(command, environment, folder, in_a_process=installs)
                assert code == 0, f"{block.where}: {command}\nexit code {code}\n{''.join(capfd.readouterr())[-4000:]}"


def run(command: str, environment: dict[str, str], folder: Path, *, in_a_process: bool) -> int:
    """Exit code of a command; one of `elmexport` alone runs in this process, which saves the imports."""
    arguments = elmexport_arguments(command)
    if arguments is None or in_a_process:
        return subprocess.run(["bash", "-euo", "pipefail", "-c", command], env=environment, cwd=folder).returncode
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.mark.parametrize("block", BLOCKS, ids=_named)
def test_blocks_are_well_formed(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.where}: the fence names no language of {', '.join(LANGUAGES)}"
    if block.language == "python":
        ast.parse(block.text, block.where)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "xml":
        ElementTree.fromstring(block.text)
    elif block.language in ("js", "swift", "csharp"):
        assert syntax_error(block.language, block.text) is None, block.where


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=_named)
def test_commands_are_understood(block: Block) -> None:
    """Options and arguments are those that the command line takes, of blocks that are not executed too."""
    group: Any = typer.main.get_command(app)
    for command in block.commands():
        arguments = elmexport_arguments(command)
        if arguments:
            try:
                group.get_command(None, arguments[0]).make_context(arguments[0], arguments[1:])
            except Exception as error:
                pytest.fail(f"{block.where}: {command}: {error}")


def test_readme_has_the_two_commands_of_continuous_integration() -> None:
    marked = [block for block in blocks(ROOT / "README.md") if {"install", "tests"} & set(block.marks)]
    assert [block.language for block in marked] == ["bash", "bash"]
    assert any(command.startswith("elmexport ") for command in marked[0].commands())
    assert re.search(r"\bpytest\b", marked[1].text)
    installs = next(step.strip() for step in marked[0].text.split("&&") if step.strip().startswith("pip install"))
    assert installs in (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")  # the tour begins with the same


def test_blocks_of_a_text() -> None:
    first, second, third = parse(
        """
<!-- install -->
```bash
python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt . && .venv/bin/elmexport coreml --model 450M && elmexport models
# a comment
elmexport logits OpenELM-450M-coreml-int4 \\
  --ids-file ids.txt
```

  <!-- not run: needs a Mac -->
  ```python
  if True:
      print(1)
  ```

```
no language
```
"""
    )
    assert first.commands() == [
        "elmexport coreml --model tiny",
        "elmexport models",
        "elmexport logits OpenELM-tiny-coreml-int4 --ids-file ids.txt",
    ]
    assert (first.not_run, second.not_run, second.text) == (None, "needs a Mac", "if True:\n    print(1)\n")
    assert (third.language, third.marks) == ("", ())
    assert elmexport_arguments("elmexport models --json  # all") == ["models", "--json"]
    assert elmexport_arguments("elmexport models | head -1") is None
    assert elmexport_arguments("echo elmexport") is None
