"""Early endings of the program: Ctrl-C, termination, a reader that goes away. Nothing half-written, one line that says how to go on.

Commands clean up as exceptions pass through them, so a request to end is always turned into one. Code written in C may answer that exception
with another one, as torch does while it reads the shape of a tensor: so what was asked is remembered too, and decides what is said.
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


class Interrupted(KeyboardInterrupt):
    """SIGINT, Ctrl-C.

    A class of its own: a plain `KeyboardInterrupt` that passes through `exec` of a text, as imports have it, marks the process, and Python then
    ends it by the signal, whoever caught the exception and whatever the exit code.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the work as Ctrl-C does."""


_asked: list[type[KeyboardInterrupt]] = []  # requests to end that were raised, and that nothing has answered yet
_repeats: list[threading.Timer] = []  # of requests that could not be raised where they came


@contextlib.contextmanager
def clean_endings() -> Iterator[None]:
    """Turn SIGTERM into an exception, and let no code lose a Ctrl-C, while the program runs."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _terminate)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background, or a caller's own
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, _unlost
    try:
        yield
    finally:
        go_on()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def go_on() -> None:
    """Forget a Ctrl-C that has been answered, by a command that goes on after one."""
    for timer in _repeats:
        timer.cancel()
    _repeats.clear()
    _asked.clear()


@contextlib.contextmanager
def ended_early(command: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Exit with the code that belongs to an interrupt or a closed pipe; `command` tells what is running, where that is known."""
    try:
        yield
        if sys.stdout is not None:  # None: closed by the caller
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        _say_ended(type(error), command())
    except typer.Exit:
        raise
    except BrokenPipeError:
        # What is still in the buffer has nowhere to go, and Python would complain when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(CLOSED_PIPE) from None
    except Exception:
        if not _asked:
            raise
        _say_ended(_asked[-1], command())


def _say_ended(kind: type[KeyboardInterrupt], command: str | None) -> NoReturn:
    for number, own in ((signal.SIGINT, _interrupt), (signal.SIGTERM, _terminate)):
        if signal.getsignal(number) is own:
            signal.signal(number, signal.SIG_IGN)  # what comes from here on asks for what is under way
    what, code = ("terminated", TERMINATED) if issubclass(kind, Terminated) else ("interrupted", INTERRUPTED)
    with contextlib.suppress(BrokenPipeError):
        line = "\n" if sys.stderr.isatty() else ""  # the terminal shows ^C on a line of its own
        typer.echo(f"{line}{what}: {KEPT.get(command or '', NOTHING_KEPT)}", err=True)
    raise typer.Exit(code) from None


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _asked.append(Interrupted)
    raise Interrupted


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    _asked.append(Terminated)
    raise Terminated


def _unlost(unraisable: Any) -> None:
    """Bring back an interrupt that came where Python cannot raise: in a callback from C, or while an object is deleted."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
        _repeats.append(threading.Timer(_AGAIN, os.kill, (os.getpid(), number)))
        _repeats[-1].start()
    else:
        sys.__unraisablehook__(unraisable)
