"""`elmexport models`."""

from __future__ import annotations

from typing import Annotated

import typer

from elmexport.cli.describe import print_json, table


def models(json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False) -> None:
    """List the models that --model knows by name.

    Any other checkpoint of their families works too, by hub id or folder.

    \b
    Example:
      elmexport models
    """
    from elmexport.checkpoint import is_local
    from elmexport.models import known_models

    known = [(model, is_local(model)) for model in known_models()]
    if json:
        facts = (
            {
                "model": m.alias,
                "hub_id": m.hub_id,
                "parameters": m.parameters,
                "context": m.config.dims.context,
                "on_this_machine": cached,
            }
            for m, cached in known
        )
        print_json(list(facts))
        return
    rows = [
        (m.alias, f"{m.parameters:,}", f"{m.config.dims.context:,}", m.hub_id or "built in", "yes" if cached else "to be downloaded")
        for m, cached in known
    ]
    typer.echo(table([("model", "parameters", "context", "source", "on this machine"), *rows], right=frozenset({1, 2})))
