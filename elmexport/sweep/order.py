"""Dependencies of a sweep's jobs: which may be handed to dask, given what has ended. Dask itself schedules, places and moves them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from elmexport.sweep.cell import Planned
from elmexport.sweep.jobs import Job, State


class Order:
    """Jobs that wait for others, in the order of the plan.

    A cell waits for its reference, and is not run where that fails. Of the cells that compute the same thing one goes first; when it has
    succeeded the others follow, and where it fails the next one tries, so that nothing is computed twice at a time.
    """

    def __init__(self, planned: Sequence[Planned], done: Collection[str] = ()) -> None:
        """`done` are the keys of jobs that an earlier run finished."""
        self._waiting = {each.job.key: each for each in planned if each.job.key not in done}
        self._done = set(done)
        self._open = {group for each in planned if each.job.key in done for group in each.groups}
        self._first: dict[str, str] = {}  # by group: the key of the cell that goes first
        self._groups = {each.job.key: each.groups for each in planned}

    def ready(self) -> list[Job]:
        """Take the jobs that wait for nothing any more."""
        found = []
        for key, each in list(self._waiting.items()):
            if each.after in self._waiting or (each.after is not None and each.after not in self._done):
                continue
            closed = [group for group in each.groups if group not in self._open]
            if any(group in self._first for group in closed):
                continue
            self._first |= dict.fromkeys(closed, key)
            found.append(self._waiting.pop(key).job)
        return found

    def ended(self, key: str, state: State) -> list[Job]:
        """Take note of how a job ended; returns those that cannot be run because of it."""
        if state is State.DONE:
            self._done.add(key)
            self._open.update(self._groups[key])
            return []
        self._first = {group: first for group, first in self._first.items() if first != key}
        lost = [each.job for each in self._waiting.values() if each.after == key]
        for job in lost:
            del self._waiting[job.key]
        return lost
