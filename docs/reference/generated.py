"""Pages of the documentation site that are made when it is built, so that they cannot differ from what they describe.

MkDocs calls `on_files`. The command line's reference is read off the program itself; the guides that lie at the repository's root become pages.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from elmexport.cli.format_commands import recipe_rows
from elmexport.cli.main import app
from elmexport.formats import FORMATS, load

ROOT = Path(__file__).parents[2]
GUIDES = {"contributing.md": "CONTRIBUTING.md", "benchmark-scripts.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md"}

ABOUT = """Made from the program itself: what `elmexport COMMAND --help` says.

Exit codes: 0 done, 1 an artifact failed its check or a gate, 2 bad use or bad input, 3 the environment lacks something (named, with the fix), 130 interrupted, 141 the reader
of its output went away, 143 terminated. Reading commands take `--json`: one document on stdout, everything else on stderr. `--quiet` leaves only what was asked for
and errors, `--verbose` says how long each stage took. `elmexport --install-completion` sets up the shell's completion; `NO_COLOR`
is honoured. `ELMEXPORT_CACHE` names the folder for caches, `ELMEXPORT_THREADS` the number of threads, `ELMEXPORT_TORCH_DEVICE` (`auto`, `cpu`, `cuda`, `mps`) what torch computes on."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site's."""
    pages = {page: guide((ROOT / source).read_text(encoding="utf-8")) for page, source in GUIDES.items()}
    for name, content in (pages | {"reference/cli.md": command_line()}).items():
        files.append(File.generated(config, name, content=content))
    return files


def guide(text: str) -> str:
    """A guide of the repository's root, its links to `docs/` made links between pages."""
    return text.replace("](docs/", "](")


def command_line() -> str:
    """The reference of all commands: help, quantizations of a format, options."""
    program: Any = typer.main.get_command(app)
    context = program.make_context("elmexport", [], resilient_parsing=True)
    parts = ["# Command line", ABOUT]
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        # a format's command is declared when it is used
        inner = command.make_context(name, ["--help"], parent=context, resilient_parsing=True)
        parts += _command(name, inner)
    return "\n\n".join(parts) + "\n"


def _command(name: str, context: Any) -> Iterator[str]:
    yield f"## elmexport {name}"
    for paragraph in inspect.cleandoc(context.command.help or "").split("\n\n"):
        if "--quant is one of" in paragraph:
            yield _quantizations(name)
        elif paragraph.startswith("\b"):
            yield "```text\n" + inspect.cleandoc(paragraph.removeprefix("\b").strip("\n")) + "\n```"
        else:
            yield _escaped(" ".join(paragraph.split()))
    yield "```text\n" + " ".join([f"elmexport {name}", *context.command.collect_usage_pieces(context)]) + "\n```"
    by_group: dict[str, list[tuple[str, str]]] = {}
    for parameter in context.command.params:
        record = parameter.get_help_record(context)  # None: hidden
        if record is not None:
            group = getattr(parameter, "rich_help_panel", None) or parameter.param_type_name
            by_group.setdefault(group, []).append((f"`{record[0]}`", _escaped(record[1])))
    for group, rows in by_group.items():
        yield _table((group, ""), rows)


def _quantizations(name: str) -> str:
    rows = [(f"`{quant}`", f"{bits:.2f}", words) for quant, bits, words in recipe_rows(load(FORMATS[name].target)())]
    return _table(("`--quant`", "bits per weight, 450M", "stored"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _escaped(text: str) -> str:
    """Help text as Markdown: nothing in it is markup but `code`."""
    return re.sub(r"([*_<>\[\]#])", r"\\\1", text)
