"""`elmexport models`."""

from __future__ import annotations

from typing import Annotated

import typer

from elmexport.cli.describe import print_json, table


def models(json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False) -> None:
    """List the models that --model knows by name.

    Any other OpenELM checkpoint works too, by hub id or folder.

    \b
    Example:
      elmexport models
    """
    from elmexport.models.zoo import known_models

    known = [(model, model.cached()) for model in known_models()]
    if json:
        facts = (
            {
                "model": m.alias,
                "hub_id": m.hub_id,
                "parameters": m.parameters,
                "context": m.config.max_context_length,
                "on_this_machine": cached,
            }
            for m, cached in known
        )
        print_json(list(facts))
        return
    rows = [
        (m.alias, f"{m.parameters:,}", f"{m.config.max_context_length:,}", m.hub_id or "built in", "yes" if cached else "to be downloaded")
        for m, cached in known
    ]
    typer.echo(table([("model", "parameters", "context", "source", "on this machine"), *rows], right=frozenset({1, 2})))
