"""`elmexport generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elmexport.cli.command import GUESSING, MODEL, OUTPUT
from elmexport.cli.describe import print_json
from elmexport.cli.progress import progress_bar
from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    from elmexport.runtimes.text import Completion, TextModel, TextOptions


def generate(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder, a bare .onnx, .mlpackage or .gguf, or a checkpoint folder.")],
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; with --chat, none for a session.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Continue many prompts: a line each, or a row each of a .jsonl (a text, or its key prompt).",
            rich_help_panel="Text",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate at most.", rich_help_panel="Text")] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T",
            help="0: always the most likely token; 1: the model's own distribution; in between: sharper.",
            rich_help_panel="Sampling",
        ),
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Draw among this many most likely tokens. [default: all]", rich_help_panel="Sampling")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Draw among the most likely tokens whose probabilities sum to this, 0 to 1. [default: all]",
            rich_help_panel="Sampling",
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Draw among tokens at least this part as likely as the most likely one, 0 to 1. [default: all]",
            rich_help_panel="Sampling",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            metavar="X", help="Above 1: tokens that were there before become less likely; 1.1 is much.", rich_help_panel="Sampling"
        ),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="SEED", help="The same seed gives the same text. [default: another text each time]", rich_help_panel="Sampling"
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text. May be repeated.", rich_help_panel="Text")
    ] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Guess N tokens from what followed the last ones earlier in the text, and verify them at once.",
            rich_help_panel=GUESSING,
        ),
    ] = None,
    ngram_size: Annotated[
        int, typer.Option(metavar="N", help="Tokens that --prompt-lookup compares, at most.", rich_help_panel=GUESSING)
    ] = 3,
    draft_model: Annotated[
        str | None,
        typer.Option(
            metavar="ARTIFACT|MODEL",
            help="Let a smaller model guess tokens, and verify them at once: an artifact, a name of `elmexport models`, a hub id, a checkpoint's folder.",
            rich_help_panel=GUESSING,
        ),
    ] = None,
    num_draft_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens that --draft-model guesses at a time.", rich_help_panel=GUESSING)
    ] = 5,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="tokenizer.model or tokenizer.json. [default: the artifact's own]", rich_help_panel=MODEL),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put the prompt into the model's chat template, as what a user says. [default: continue it as a text]",
            rich_help_panel="Text",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Continue a prompt, many, or chat; text streams to stdout.

    Ends at a token that ends texts, at --stop, at --max-tokens, or, with a note, when the artifact's context is full. Guessing changes the speed,
    not the text.

    \b
    Example:
      elmexport generate tiny-onnx "Once upon a time" --temperature 0.8 --seed 7
      elmexport generate tiny-onnx "Once upon a time" --prompt-lookup 8
    """
    from elmexport.runtimes.prompts import read_prompts
    from elmexport.runtimes.sampler import Sampling
    from elmexport.runtimes.text import TextOptions, open_text_model

    sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty)
    options = TextOptions(max_tokens, sampling, tuple(stop or ()), prompt_lookup, ngram_size, num_draft_tokens)
    if (prompt is None) == (prompts is None) and not (chat and prompts is None):
        raise ElmExportError("give a prompt, or --prompts FILE, one of them; or --chat alone for a session")
    if json and prompt is None and prompts is None:
        raise ElmExportError("--json prints answers when all are there, which a session is not for; give a prompt or --prompts FILE")
    many = None if prompts is None else read_prompts(prompts)
    with progress_bar(transient=True) as progress:
        progress.stage(f"opening {artifact.name}")
        model = open_text_model(artifact, tokenizer=tokenizer, draft=draft_model)
    try:
        if prompt is None and many is None:
            from elmexport.cli.chat import session
            from elmexport.runtimes.chat import Chat

            session(Chat(model, options))
            return
        texts = many or [prompt or ""]
        completions = _completions(model, texts, options, chat=chat, show=not json)
        if json:
            documents = []
            with progress_bar(transient=True) as progress:
                progress.stage("generating", len(texts))
                for one, done in zip(texts, completions, strict=True):
                    documents.append({"prompt": one, **_document(done)})
                    progress.advance(1)
            print_json(documents[0] if many is None else {"completions": documents})
            return
        for number, one in enumerate(texts):
            if many is not None:
                typer.echo(f"{'' if number == 0 else chr(10)}{one}", nl=False)
            done = next(completions)
            typer.echo()
            _notes(done)
        next(completions, None)  # what is said when all are there
    finally:
        model.close()


def _completions(model: TextModel, texts: list[str], options: TextOptions, *, chat: bool, show: bool) -> Iterator[Completion]:
    from elmexport.runtimes.chat import Chat

    encode: Callable[[str], list[int]] = Chat(model, options).encode if chat else model.encode

    def write(text: str) -> None:
        if show:
            typer.echo(text, nl=False)  # flushes

    return model.complete_many([encode(text) for text in texts], options, write, lambda line: typer.echo(f"note: {line}", err=True))


def _notes(done: Completion) -> None:
    if done.stop == "context full":
        typer.echo("note: stopped because the context is full; export with a larger --context for longer texts", err=True)
    guesses = done.speculation
    if guesses is None:
        return
    if guesses.note is not None:
        typer.echo(f"note: {guesses.note}", err=True)
    words = f"{guesses.accepted} of {guesses.drafted} guesses accepted, {guesses.mean_accepted:.2f} in a step"
    if done.rate is not None:
        words += f"; {done.rate:.1f} tokens/s"
        if done.plain_rate is not None:
            words += f", {done.rate / done.plain_rate:.2f} times plain decoding"
    typer.echo(f"note: {words}", err=True)


def _document(done: Completion) -> dict[str, Any]:
    guesses = done.speculation
    return {
        "text": done.text,
        "tokens": list(done.tokens),
        "stop": done.stop,
        "prompt_tokens": done.prompt_tokens,
        "tokens_per_s": done.rate,
        "plain_tokens_per_s": done.plain_rate,
        "speculation": None if guesses is None else {**vars(guesses), "mean_accepted": guesses.mean_accepted},
    }
