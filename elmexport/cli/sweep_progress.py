"""Progress of a sweep on stderr: a live table on a terminal, a line for each finished cell elsewhere; and the tables around it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from elmexport.cli.describe import table
from elmexport.sweep.folder import FAILURES, is_done
from elmexport.sweep.jobs import Job, Outcome, State

if TYPE_CHECKING:
    from rich.live import Live

    from elmexport.sweep.cell import Planned
    from elmexport.sweep.expansion import Expansion

_SHOWN = 12  # rows of the live table at most


def describe(expansion: Expansion, out: Path) -> str:
    """Describe the jobs of a plan in their order, and which of them `out` holds already."""
    rows: list[tuple[str, ...]] = [("", "job", "key", "", "after")]
    labels = {each.job.key: each.job.label for each in expansion.jobs}
    first: dict[str, str] = {}
    for number, each in enumerate(expansion.jobs, start=1):
        waits = [] if each.after is None else [labels[each.after]]
        makers = dict.fromkeys(first.setdefault(group, each.job.label) for group in each.groups)
        waits += [f"{maker}, whose codes or statistics it takes" for maker in makers if maker != each.job.label]
        state = "done" if is_done(out, each.job.kind, each.job.key) else ""
        rows.append((str(number), each.job.label, each.job.key, state, "; ".join(waits)))
    left = sum(not row[3] for row in rows[1:])
    return f"{table(rows, right=frozenset({0}))}\n\n{_jobs(left)} to do, {len(rows) - 1 - left} done."


@contextlib.contextmanager
def watched(planned: Sequence[Planned], out: Path) -> Iterator[_Lines]:
    """Show the progress of the jobs for the length of a `with` block."""
    jobs = [each.job for each in planned if not is_done(out, each.job.kind, each.job.key)]
    if len(jobs) < len(planned):
        typer.echo(f"{_jobs(len(planned) - len(jobs))} done before, {len(jobs)} to do", err=True)
    if sys.stderr is None or not sys.stderr.isatty():
        yield _Lines(jobs)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=2, transient=True) as live:
        yield _Table(jobs, live)


def print_failures(planned: Sequence[Planned], outcomes: Mapping[str, Outcome], out: Path) -> bool:
    """Print how the sweep went, with a table of what failed; returns whether something did."""
    failed = [(each.job, outcome) for each in planned if (outcome := outcomes.get(each.job.key)) and outcome.state is not State.DONE]
    done = len(planned) - len(failed)
    typer.echo(f"{_jobs(done)} of {len(planned)} done in {out}; draw them with: elmexport report {out}")
    if not failed:
        return False
    typer.echo(f"\n{_jobs(len(failed))} failed:", err=True)
    rows: list[tuple[str, ...]] = [
        ("job", "attempts", "why"),
        *((job.label, str(outcome.attempts), outcome.message) for job, outcome in failed),
    ]
    typer.echo(table(rows), err=True)
    if any((out / FAILURES / f"{job.key}.txt").is_file() for job, _ in failed):
        typer.echo(f"Their logs are in {out / FAILURES}. The same command tries them again.", err=True)
    return True


class _Lines:
    """A line for every job that ends."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = {job.key: job for job in jobs}
        self._ended: dict[str, Outcome] = {}
        self._started = time.monotonic()
        self._places = 1

    def ended(self, job: Job, outcome: Outcome) -> None:
        self._ended[job.key] = outcome
        self._say(f"{len(self._ended)}/{len(self._jobs)}  {job.label}: {_words(outcome)}{self._left()}")

    def retried(self, job: Job, outcome: Outcome) -> None:
        self._say(f"{job.label}: {outcome.message}; trying again")

    def lost(self) -> None:
        self._say("the dask scheduler cannot be reached; waiting for it to come back")

    def tick(self, running: Sequence[str], places: int) -> None:
        self._places = max(1, places)

    def _say(self, line: str) -> None:
        typer.echo(line, err=True)

    def _left(self) -> str:
        """The time left, by the mean of the jobs that are done."""
        spent = [seconds for outcome in self._ended.values() if (seconds := sum(outcome.seconds.values()))]
        left = len(self._jobs) - len(self._ended)
        return f", {_time(sum(spent) / len(spent) * left / self._places)} left" if spent and left else ""


class _Table(_Lines):
    """A table that is drawn again and again: what runs, and for how long."""

    def __init__(self, jobs: Sequence[Job], live: Live) -> None:
        super().__init__(jobs)
        self._live = live
        self._since: dict[str, float] = {}

    def tick(self, running: Sequence[str], places: int) -> None:
        super().tick(running, places)
        now = time.monotonic()
        self._since = {key: self._since.get(key, now) for key in running if key not in self._ended}
        self._live.update(self._drawn(now))

    def _say(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _drawn(self, now: float) -> Any:
        from rich.console import Group
        from rich.table import Table

        drawn = Table(box=None, pad_edge=False)
        drawn.add_column("running")
        drawn.add_column("for", justify="right")
        for key, since in list(self._since.items())[:_SHOWN]:
            drawn.add_row(self._jobs[key].label, _time(now - since))
        return Group(self._title(now), drawn)

    def _title(self, now: float) -> str:
        failed = sum(outcome.state is not State.DONE for outcome in self._ended.values())
        words = f"{len(self._ended)} of {len(self._jobs)} jobs" + (f", {failed} failed" if failed else "")
        return f"{words}, {_time(now - self._started)} so far{self._left()}"


def _words(outcome: Outcome) -> str:
    took = _time(sum(outcome.seconds.values()))
    return f"done in {took}, {outcome.peak_bytes / 1e9:.1f} GB" if outcome.state is State.DONE else f"{outcome.state}: {outcome.message}"


def _jobs(count: int) -> str:
    return f"{count} job" + ("" if count == 1 else "s")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
