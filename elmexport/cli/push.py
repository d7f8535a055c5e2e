"""`elmexport push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elmexport.cli.progress import Quiet, Verbose, progress_bar


def push(
    artifact: Annotated[Path, typer.Argument(help="The folder that an export printed.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Hub repository; made if it is not there.")],
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Evaluation of this artifact (eval --report FILE.json), to put into the card.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files of the same names.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload an artifact with its card to the Hugging Face hub.

    Verifies the files first, and makes one commit. The token is HF_TOKEN's, or that of `hf auth login`.

    \b
    Example:
      elmexport push 450M-gguf me/450M-GGUF
    """
    from elmexport.push import push as library_push

    with progress_bar(quiet=quiet, verbose=verbose) as progress:
        url = library_push(artifact, repository, report=report, private=private, force=force, progress=progress)
    typer.echo(url)
