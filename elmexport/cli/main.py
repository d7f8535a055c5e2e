"""The `elmexport` program: its commands, and how it ends.

Exit codes: 0 done, 1 a gate failed, 2 bad use or bad input, 3 the environment lacks something, 130 interrupted, 141 the reader of its output
went away, 143 terminated.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from elmexport import __version__
from elmexport.cli import bench, calibrate, compare, eval, generate, inspect, lint, logits, models, push, report, sweep
from elmexport.cli.command import Command
from elmexport.cli.ending import clean_endings, ended_early
from elmexport.cli.format_commands import FormatGroup
from elmexport.errors import ElmExportError, MissingDependencyError, out_of_memory, shortened


class Program(FormatGroup):
    """The commands, ended early where asked to."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with ended_early():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        with ended_early(lambda: ctx.invoked_subcommand):
            return super().invoke(ctx)


app = typer.Typer(name="elmexport", cls=Program, rich_markup_mode=None, pretty_exceptions_enable=False)
GREETING = """\
elmexport writes language models as ONNX, Core ML, GGUF and MLX, and measures
what quantizing them cost. Three commands to begin with; the model is built in:

  elmexport coreml --model tiny --quant int4 --out tiny-coreml
  elmexport eval tiny-coreml --limit 100
  elmexport generate tiny-coreml "It was a dark night"

All commands: elmexport --help. The options of one: elmexport coreml --help.
"""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"elmexport {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def elmexport(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Export on-device language models to ONNX, Core ML, GGUF and MLX, quantized to 8 or 4 bits, and check what the quantization cost.

    The whole path on the small model that is built in, no download needed:

    \b
      elmexport coreml --model tiny --quant int4 --out tiny-coreml
      elmexport generate tiny-coreml "It was a dark night"

    Exit codes: 0 done, 1 an artifact failed its check, 2 bad use or bad input, 3 the environment lacks something.
    """
    if context.invoked_subcommand is None:
        typer.echo(GREETING, nl=False)


app.command("calibrate", cls=Command)(calibrate.calibrate)
app.command("eval", cls=Command)(eval.evaluate)
app.command("report", cls=Command)(report.report)
app.command("bench", cls=Command)(bench.bench)
app.command("sweep", cls=Command)(sweep.sweep)
app.command("models", cls=Command)(models.models)
app.command("generate", cls=Command)(generate.generate)
app.command("compare", cls=Command)(compare.compare)
app.command("inspect", cls=Command)(inspect.inspect)
app.command("lint", cls=Command)(lint.lint)
app.command("push", cls=Command)(push.push)
app.command("logits", cls=Command)(logits.logits)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on `arguments` (those of the process where None). Ends the process, always: SystemExit carries the exit code."""
    # torch and llama.cpp share GNU's OpenMP, whose threads spin for long when they wait, which is ruinous on a busy machine; not to spin at
    # all costs as much on an idle one. A short spin is good on both. Read when torch is loaded, so nothing below could set it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal's encoding cannot
    try:
        with clean_endings():
            app(arguments)
    except ElmExportError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        lack = out_of_memory(error)
        if lack is not None:
            typer.echo(f"error: {lack}", err=True)
            sys.exit(MissingDependencyError.exit_code)
        if not isinstance(error, OSError) or error.strerror is None:
            raise
        # Of the system, not foreseen: a name too long, a folder closed to this user.
        typer.echo(shortened(f"error: {error.strerror}" + ("" if error.filename is None else f": {error.filename}")), err=True)
        sys.exit(ElmExportError.exit_code)
