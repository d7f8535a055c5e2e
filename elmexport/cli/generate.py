"""`elmexport generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder, a bare .onnx, .mlpackage or .gguf, or a checkpoint folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0: always the most likely token; 1: the model's own distribution; in between: sharper.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Draw among this many most likely tokens. [default: all]")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Draw among the most likely tokens whose probabilities sum to this, 0 to 1. [default: all]"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="SEED", help="The same seed gives the same text. [default: another text each time]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="tokenizer.model or tokenizer.json. [default: the artifact's own]")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put the prompt into the model's chat template, as what a user says. [default: continue it as a text]"),
    ] = False,
) -> None:
    """Continue a prompt; text streams to stdout.

    Ends at a token that ends texts, at --max-tokens, or, with a note, when the artifact's context is full.

    \b
    Example:
      elmexport generate tiny-onnx "Once upon a time" --temperature 0.8 --seed 7
    """
    from elmexport.runtimes.sampler import Sampling
    from elmexport.runtimes.text import generate_text

    def write(text: str) -> None:
        typer.echo(text, nl=False)  # flushes

    sampling = Sampling(temperature, top_k, top_p, seed)
    stop = generate_text(artifact, prompt, max_tokens=max_tokens, sampling=sampling, write=write, tokenizer=tokenizer, chat=chat)
    typer.echo()
    if stop == "context full":
        typer.echo("note: stopped because the context is full; export with a larger --context for longer texts", err=True)
