"""Early endings of the program: Ctrl-C, termination, a reader that goes away. Nothing half-written, one line that says how to go on.

Commands clean up as exceptions pass through them, so a request to end is always turned into one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

import typer

INTERRUPTED, TERMINATED, CLOSED_PIPE = 130, 143, 141  # exit codes: 128 and the signal's number, as shells have it
_AGAIN = 0.05  # seconds
KEPT: Mapping[str, str] = {
    "eval": "answers so far are kept; the same command goes on from there",
    "report": "answers so far are kept; the same command goes on from there",
    "calibrate": "the layers measured so far are kept; the same command goes on from there",
    "sweep": "finished cells are kept; the same command does the rest",
    "bench": "its measurements are not kept; run the command again",
    "compare": "completions are not kept; run the command again",
    "generate": "the text so far is all there is",
}
NOTHING_KEPT = "nothing half-written was left; run the same command again"


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the work as Ctrl-C does."""


@contextlib.contextmanager
def clean_endings() -> Iterator[None]:
    """Turn SIGTERM into an exception, and let no code lose a Ctrl-C, while the program runs."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return
    before, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    sys.unraisablehook = _unlost
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def ended_early(command: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Exit with the code that belongs to an interrupt or a closed pipe; `command` tells what is running, where that is known."""
    try:
        yield
        if sys.stdout is not None:  # None: closed by the caller
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        what, code = ("terminated", TERMINATED) if isinstance(error, Terminated) else ("interrupted", INTERRUPTED)
        with contextlib.suppress(BrokenPipeError):
            line = "\n" if sys.stderr.isatty() else ""  # the terminal shows ^C on a line of its own
            typer.echo(f"{line}{what}: {KEPT.get(command() or '', NOTHING_KEPT)}", err=True)
        raise typer.Exit(code) from None
    except BrokenPipeError:
        # What is still in the buffer has nowhere to go, and Python would complain when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(CLOSED_PIPE) from None


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _unlost(unraisable: Any) -> None:
    """Bring back an interrupt that came where Python cannot raise: in a callback from C, or while an object is deleted."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
        threading.Timer(_AGAIN, os.kill, (os.getpid(), number)).start()
    else:
        sys.__unraisablehook__(unraisable)
