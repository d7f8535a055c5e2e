"""The progress bar: drawn on stderr where that is a terminal, nothing anywhere else."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from elmexport.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Give a `Progress` that lives on the terminal for the length of a `with` block."""
    if sys.stderr is None or not sys.stderr.isatty():  # None: closed by the caller
        yield SilentProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    colour: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    with RichProgress(*columns, console=Console(stderr=True, color_system=colour)) as bar:
        yield _Bar(bar)


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

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bar.tasks[self._task]
            total = task.total if task.total is not None else max(task.completed, 1)
            self._bar.update(self._task, total=total, completed=total)
            self._bar.stop_task(self._task)
