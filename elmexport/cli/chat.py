"""A chat session: on a terminal with a prompt for each turn, from a pipe a turn a line."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from elmexport.cli.ending import Terminated, go_on
from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    from elmexport.runtimes.chat import Chat

HELP = "/reset forgets everything, /save FILE writes the conversation, Ctrl-C stops an answer, Ctrl-D ends."


def session(chat: Chat) -> None:
    """Talk until the input ends. Answers go to stdout, all else to stderr."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # editing and recalling lines, where Python was built with it
            import readline  # noqa: F401
        typer.echo(HELP, err=True)
    while (text := _next_line(terminal)) is not None:
        if not text.strip():
            continue
        try:
            if text.startswith("/") and terminal:
                _command(chat, text)
            else:
                _answer(chat, text)
        except ElmExportError as error:
            if not terminal:
                raise
            typer.echo(f"error: {error}", err=True)


def _next_line(terminal: bool) -> str | None:
    """What the user says next; None at the end."""
    while True:
        try:
            return input("> " if terminal else "")
        except EOFError:
            if terminal:
                typer.echo(err=True)
            return None
        except KeyboardInterrupt as error:
            if not terminal or isinstance(error, Terminated):  # SIGTERM is no Ctrl-C
                raise
            go_on()
            typer.echo(f"\n{HELP}", err=True)


def _answer(chat: Chat, text: str) -> None:
    def write(piece: str) -> None:
        typer.echo(piece, nl=False)  # flushes

    try:
        done = chat.say(text, write, note=lambda line: typer.echo(f"note: {line}", err=True))
    except KeyboardInterrupt as error:
        if not sys.stdin.isatty() or isinstance(error, Terminated):
            raise
        go_on()
        typer.echo("\nnote: stopped; the answer is kept as far as it came", err=True)
        return
    typer.echo()
    if done.stop == "context full":
        typer.echo("note: stopped because the context is full; /reset begins anew", err=True)


def _command(chat: Chat, text: str) -> None:
    name, _, argument = text.strip().partition(" ")
    if name == "/reset":
        chat.reset()
        typer.echo("forgotten", err=True)
    elif name == "/save" and argument:
        path = Path(argument).expanduser()
        chat.save(path)
        typer.echo(f"wrote {path}", err=True)
    else:
        raise ElmExportError(f"{text.strip()} is no command. {HELP}")
