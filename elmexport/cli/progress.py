"""Progress of commands that take long, on stderr: a bar where that is a terminal, notes, and with --verbose the time of each stage."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elmexport.cli.command import OUTPUT
from elmexport.errors import ElmExportError
from elmexport.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


Quiet = Annotated[bool, typer.Option("--quiet", rich_help_panel=OUTPUT, help="No bar and no notes: only what was asked for, and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", rich_help_panel=OUTPUT, help="Say how long each stage took.")]


def note(text: str, *, quiet: bool) -> None:
    """Say what is not an error, unless `quiet`."""
    if not quiet:
        typer.echo(f"note: {text}", err=True)


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False, verbose: bool = False, transient: bool = False) -> Iterator[Progress]:
    """Give a `Progress` that lives on the terminal for the length of a `with` block; `transient`: and is wiped off after it.

    Raises:
        ElmExportError: `quiet` and `verbose`.
    """
    if quiet and verbose:
        raise ElmExportError("--quiet and --verbose exclude each other; leave one of them out")
    with _bar(shown=not quiet, transient=transient) as (bar, write):
        if not verbose:
            yield bar
            return
        timed = _Timed(bar, write)
        try:
            yield timed
        finally:
            timed.finish()


@contextlib.contextmanager
def _bar(*, shown: bool, transient: bool) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """A bar, where there is a terminal to draw it on, and a function that writes a line above it."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():  # None: closed by the caller
        yield SilentProgress(), lambda line: typer.echo(line, err=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    colour: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    with RichProgress(*columns, console=Console(stderr=True, color_system=colour), transient=transient) as bar:
        yield _Bar(bar), lambda line: bar.console.print(line, markup=False, highlight=False)


class _Bar:
    """One line for each stage."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def stage(self, name: str, total: int | None = None) -> None:
        self._finish()
        self._task = self._bar.add_task(name, total=total)

    def advance(self, n: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, n)

    def lend(self, name: str) -> bool:
        self._finish()
        self._task = None
        self._bar.stop()
        self._bar.console.print(name, markup=False, highlight=False)
        return True

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bar.tasks[self._task]
            total = task.total if task.total is not None else max(task.completed, 1)
            self._bar.update(self._task, total=total, completed=total)
            self._bar.stop_task(self._task)


class _Timed:
    """Passes progress on, and writes how long each stage took when it ends, and all together."""

    def __init__(self, inner: Progress, write: Callable[[str], None]) -> None:
        self._inner, self._write = inner, write
        self._name, self._begun = "start", time.monotonic()
        self._first = self._begun

    def stage(self, name: str, total: int | None = None) -> None:
        self._end()
        self._name = name
        self._inner.stage(name, total)

    def advance(self, n: int) -> None:
        self._inner.advance(n)

    def lend(self, name: str) -> bool:
        self._end()
        self._name = name
        return self._inner.lend(name)

    def finish(self) -> None:
        self._end()
        self._line(self._begun - self._first, "in all")

    def _end(self) -> None:
        now = time.monotonic()
        self._line(now - self._begun, self._name)
        self._begun = now

    def _line(self, seconds: float, name: str) -> None:
        self._write(f"{seconds:8.1f} s  {name}")
