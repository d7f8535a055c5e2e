"""`elmexport inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elmexport.cli.command import OUTPUT
from elmexport.cli.describe import describe, print_json, size, table
from elmexport.cli.progress import Quiet, Verbose, progress_bar
from elmexport.errors import ElmExportError


def inspect(
    artifact: Annotated[Path, typer.Argument(help="The folder that an export printed.")],
    tensors: Annotated[
        bool,
        typer.Option("--tensors", help="Also list every tensor as the files hold it: role, storage, shape, bytes.", rich_help_panel=OUTPUT),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Show what an artifact holds; verify its files.

    Compares every file's SHA-256 with the manifest. Ends with exit code 2, naming the files, if one is not what was exported.

    \b
    Example:
      elmexport inspect tiny-gguf --tensors
    """
    from elmexport.artifact import StoredTensor
    from elmexport.inspection import inspect_artifact

    def row(tensor: StoredTensor) -> tuple[str, ...]:
        return tensor.name, tensor.role or "-", tensor.scheme, "x".join(map(str, tensor.shape)) or "scalar", f"{tensor.bytes:,}"

    with progress_bar(quiet=quiet, verbose=verbose) as progress:
        found = inspect_artifact(artifact, tensors=tensors, progress=progress)
    if json:
        listing = None if found.tensors is None else [{**vars(tensor), "shape": list(tensor.shape)} for tensor in found.tensors]
        print_json(
            {"path": str(artifact), "problems": list(found.problems), **found.artifact.manifest.to_dict()}
            | ({"tensors": listing} if tensors else {})
        )
    else:
        typer.echo(describe(found.artifact))
        typer.echo("\nfiles")
        typer.echo(table([(name, size(facts.bytes)) for name, facts in found.artifact.manifest.files.items()], right=frozenset({1})))
        if found.tensors is not None:
            typer.echo("\ntensors")
            typer.echo(table([("name", "role", "stored as", "shape", "bytes"), *map(row, found.tensors)], right=frozenset({4})))
    if found.problems:
        raise ElmExportError(f"{artifact} is not what was exported: {'; '.join(found.problems)}. Copy it again or export it again")
    if not json:
        typer.echo("\nEvery file is what was exported: its SHA-256 is the manifest's.")
