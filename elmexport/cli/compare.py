"""`elmexport compare`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elmexport.cli.command import OUTPUT
from elmexport.cli.describe import print_json, table
from elmexport.cli.eval_options import Against, TokenizerFile
from elmexport.cli.progress import Quiet, Verbose, progress_bar
from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    from elmexport.evaluation.completions import ComparedText, SideBySide

MARK = "»"  # before the first token that differs


def compare(
    artifacts: Annotated[
        list[Path], typer.Argument(help="Artifact folders, bare model files, or checkpoint folders, of one model or several.")
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts, a line each or a row each of a .jsonl. [default: ten that come with elmexport]",
            rich_help_panel="Text",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each completion at most.", rich_help_panel="Text")] = 48,
    against: Against = "fp16",
    tokenizer: TokenizerFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Read what several artifacts say to the same prompts.

    Each prompt's most likely continuation, the fp16 model's first; » marks where an artifact first says something else. Below, after how many
    tokens that happens, the median over all prompts.

    \b
    Example:
      elmexport compare tiny-onnx tiny-gguf --prompts questions.txt
    """
    from elmexport.evaluation.completions import side_by_side
    from elmexport.runtimes.prompts import bundled_prompts, read_prompts

    chosen = bundled_prompts() if prompts is None else read_prompts(prompts)
    if against == "none" and len(artifacts) < 2:
        raise ElmExportError("--against none leaves one artifact, and nothing to compare it with; name two")
    with progress_bar(quiet=quiet, verbose=verbose) as progress:
        found = side_by_side(
            artifacts, chosen, against=None if against == "none" else against, max_tokens=max_tokens, tokenizer=tokenizer, progress=progress
        )
    if json:
        print_json(found.to_dict())
        return
    _show(found)


def _show(found: SideBySide) -> None:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for i, prompt in enumerate(found.prompts):
        typer.echo(f"{prompt}")
        typer.echo(table([(f"  {model.name}", _marked(model.texts[i], colour=colour)) for model in found.models]))
        typer.echo()
    rows: list[tuple[str, ...]] = [("artifact", "tokens until it differs", "texts that do")]
    for model in found.models[1:]:
        if model.divergence is None:
            rows.append((model.name, "another tokenizer", "-"))
            continue
        differing = sum(text.diverges_at is not None for text in model.texts)
        rows.append((model.name, f"{model.divergence:g} of {found.max_tokens}", f"{differing} of {len(model.texts)}"))
    typer.echo(f"compared with {found.models[0].name}:")
    typer.echo(table(rows))


def _marked(text: ComparedText, *, colour: bool) -> str:
    def line(words: str) -> str:
        return words.replace("\n", "\\n").replace("\r", "\\r")

    mark = "" if text.diverges_at is None else MARK
    if colour and mark:
        return line(text.shared) + typer.style(mark + line(text.rest), fg="yellow")
    return line(text.shared) + mark + line(text.rest)
