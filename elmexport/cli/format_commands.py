"""Export commands, `elmexport onnx` and so on: one for each known format, its target imported when the command is used."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from elmexport.cli.command import Command
from elmexport.errors import ElmExportError
from elmexport.formats import FORMATS, Format, find_format, format_names, load

SIZED = "450M"  # the model whose bits per weight the list of --quant gives


class FormatGroup(TyperGroup):
    """The program's commands: one for each format, and those that were declared."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return [*(name for name in format_names() if name not in own), *own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        if own is not None or not (cmd_name in FORMATS or cmd_name in format_names()):
            return own
        return _FormatCommand(cmd_name, short_help=_short_help(cmd_name))


class _FormatCommand(TyperCommand):
    """Export command whose target is not imported before it is used."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        return _declared(find_format(self.name), helps="--help" in args).make_context(info_name, args, parent, **extra)


def _short_help(name: str) -> str:
    try:
        return f"Export a model to {find_format(name).words}."
    except ElmExportError as error:  # of a package that is broken, which must not take the other commands with it
        return str(error)


def _declared(row: Format, *, helps: bool) -> Any:
    """The command itself; its help page, which reads every recipe, only where it is asked for."""
    from elmexport.cli.export import command

    target = load(row.target)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(row.name, cls=Command, help=_help(row, target) if helps else None)(command(target))
    return typer.main.get_command(app)


def _help(row: Format, target: Any) -> str:
    paragraphs = [f"Export a model to {row.words}.", f"\b\n--quant is one of (bits per weight of {SIZED}):\n{_quants(target())}"]
    if target.quants_note:
        paragraphs.append(target.quants_note)
    paragraphs.append(f"\b\nExample:\n  elmexport {row.name} {target.example}")
    return "\n\n".join(paragraphs)


def recipe_rows(target: Any) -> list[tuple[str, float, str]]:
    """The recipes of `target`: name, bits per weight of `SIZED`, words."""
    from elmexport.models import find_model
    from elmexport.quantization.recipes import resolve

    model = find_model(SIZED)
    assert model is not None
    rows = []
    for quant in target.quants:
        recipe = target.stored_recipe(quant)
        words = recipe.words + (" (default)" if quant == target.quants[0] else "")
        rows.append((quant, resolve(recipe, model.config).bits_per_weight, words))
    return rows


def _quants(target: Any) -> str:
    """The list of the recipes for a terminal."""
    names = max(map(len, target.quants))
    width = max(min(shutil.get_terminal_size().columns, 80) - 4, 50)  # of a help page, less its margin
    lines = []
    for quant, bits, words in recipe_rows(target):
        start = f"  {quant:<{names}}  {bits:4.1f}  "
        lines += textwrap.wrap(words, width, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)
    return "\n".join(lines)
