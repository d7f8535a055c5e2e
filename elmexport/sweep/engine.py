"""Engine of a sweep: hands jobs to dask.distributed, tries crashed ones again, and waits for a scheduler that is restarted.

Dask schedules, queues, moves and restarts; what is here is what it does not know: which outcomes are worth another attempt, and what to do
when the scheduler itself, with all that it knew, is gone. What counts as done is in the folder, so nothing is lost with it.
"""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from elmexport.cores import asked_threads, available_cores
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.sweep.cell import Planned
from elmexport.sweep.folder import is_done
from elmexport.sweep.jobs import Job, Outcome, State
from elmexport.sweep.order import Order
from elmexport.sweep.worker import run_job

if TYPE_CHECKING:
    from distributed import Client, Future

PATIENCE = 600.0  # seconds that a scheduler may be gone
ANSWER = 10.0  # seconds in which a scheduler has to answer at first
_TICK = 1.0
_GROUP = "cells"  # of dask's keys


class Watch(Protocol):
    """Receives what happens in a sweep."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Report a job that ended, and is not tried again."""

    def retried(self, job: Job, outcome: Outcome) -> None:
        """Report an attempt that ended badly, and that another one follows."""

    def lost(self) -> None:
        """Report that the scheduler cannot be reached."""

    def tick(self, running: Sequence[str], places: int) -> None:
        """Report the keys of jobs that run at the moment, and how many can run at a time."""


@contextlib.contextmanager
def local_client(workers: int) -> Iterator[Client]:
    """Start `workers` worker processes on this machine, which share its memory and cores, for the length of a `with` block.

    Raises:
        MissingDependencyError: dask.distributed is not installed.
    """
    distributed = _distributed()
    import dask
    from distributed.system import MEMORY_LIMIT

    with (
        dask.config.set({"distributed.scheduler.worker-saturation": 1.0}),  # a cell that waits should not wait for one worker
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=int(MEMORY_LIMIT / workers),
            dashboard_address="127.0.0.1:0",  # none would be 8787, taken by the next sweep
            silence_logs=50,
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def local_threads(workers: int) -> int:
    """Threads of each of so many workers: those that `ELMEXPORT_THREADS` asks for, or an equal share of the cores."""
    return asked_threads() or max(1, available_cores() // workers)


@contextlib.contextmanager
def remote_client(address: str) -> Iterator[Client]:
    """Connect to the dask scheduler at `address` for the length of a `with` block.

    Raises:
        ElmExportError: nothing answers there, or it is no address.
        MissingDependencyError: dask.distributed is not installed.
    """
    distributed = _distributed()
    try:
        distributed.Client(address, timeout=ANSWER, set_as_default=False).close()
        client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)  # for which it tries to connect again, too
    except (OSError, ValueError) as error:
        raise ElmExportError(
            f"no dask scheduler answers at --scheduler {address} ({str(error).splitlines()[0]}); start one with `dask scheduler`, and give the address that it prints"
        ) from None
    with client:
        yield client


def run_jobs(
    client: Client, planned: Sequence[Planned], watch: Watch, *, retries: int = 1, patience: float = PATIENCE
) -> dict[str, Outcome]:
    """Run the jobs that are not done yet; returns how each of them ended, by key.

    A job that crashed, or whose worker was lost more often than dask moves it, is tried `retries` times more.

    Raises:
        ElmExportError: the scheduler went, and was not back within `patience` seconds. What was finished until then is in the folder.
    """
    return _Run(client, planned, watch, retries, patience).outcomes()


class _Run:
    def __init__(self, client: Client, planned: Sequence[Planned], watch: Watch, retries: int, patience: float) -> None:
        self._client, self._watch, self._retries, self._patience = client, watch, retries, patience
        done = {each.job.key for each in planned if is_done(Path(each.job.folder), each.job.kind, each.job.key)}
        self._jobs = {each.job.key: each.job for each in planned}
        self._order = Order(planned, done)
        self._left = len(planned) - len(done)
        self._events: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._flying: dict[tuple[str, str], tuple[Job, Future]] = {}  # by dask's key of the attempt
        self._again: list[Job] = []  # whose attempts went with the scheduler
        self._attempts: Counter[str] = Counter()
        self._outcomes: dict[str, Outcome] = {}
        self._gone_since: float | None = None

    def outcomes(self) -> dict[str, Outcome]:
        self._submit(self._order.ready())
        while self._left:
            try:
                self._take(self._events.get(timeout=_TICK))
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._take(self._events.get_nowait())
            except queue.Empty:
                pass
            self._reconnect()
            self._submit(self._order.ready())
            self._watch.tick(*self._running())
        return self._outcomes

    def _submit(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        if self._gone_since is not None:
            self._again += jobs
            return
        # Tasks of one group wait at the scheduler until a worker is free; of others it hands several to a worker at once.
        keys = [(_GROUP, f"{job.label} {job.key} {uuid.uuid4().hex[:8]}") for job in jobs]
        futures = self._client.map(run_job, [msgspec.json.encode(job) for job in jobs], key=keys, pure=False)
        for key, job, future in zip(keys, jobs, futures, strict=True):
            self._flying[key] = job, future
            future.add_done_callback(self._events.put)

    def _take(self, future: Future) -> None:
        job, _ = self._flying.pop(future.key)
        if future.status == "finished":
            outcome = msgspec.json.decode(future.result(), type=Outcome)
        elif future.status == "error":
            outcome = Outcome(job.key, State.CRASHED, _words(future.exception()))
        else:  # cancelled, or lost: the scheduler went
            self._again.append(job)
            return
        self._attempts[job.key] += 1
        outcome = msgspec.structs.replace(outcome, attempts=self._attempts[job.key])
        if outcome.state is State.CRASHED and self._attempts[job.key] <= self._retries:
            self._watch.retried(job, outcome)
            self._submit([job])
            return
        self._end(job, outcome)

    def _end(self, job: Job, outcome: Outcome) -> None:
        self._left -= 1
        self._outcomes[job.key] = outcome
        self._watch.ended(job, outcome)
        for other in self._order.ended(job.key, outcome.state):
            self._end(other, Outcome(other.key, State.FAILED, f"not run: {job.label} failed"))

    def _reconnect(self) -> None:
        """Hand out again what went with the scheduler, when there is one again: the client connects to it by itself."""
        if self._client.status == "running":
            self._gone_since = None
            again, self._again = self._again, []
            self._submit(again)
            return
        if self._gone_since is None:
            self._gone_since = time.monotonic()
            self._watch.lost()
        if time.monotonic() - self._gone_since > self._patience or self._client.status == "closed":
            raise ElmExportError(
                "the dask scheduler went and did not come back; start it and its workers again, and run the same command: finished cells are kept"
            )

    def _running(self) -> tuple[list[str], int]:
        """Keys of the jobs that workers have begun, and how many jobs they can run at a time."""
        if self._gone_since is not None:
            return [], 0
        with contextlib.suppress(OSError):
            threads: Mapping[str, int] = self._client.nthreads()
            processing: Mapping[str, Sequence[tuple[str, str]]] = self._client.processing()
            begun = [key for worker, keys in processing.items() for key in keys[: threads.get(worker, 0)]]  # in order; more may wait there
            return [self._flying[key][0].key for key in begun if key in self._flying], sum(threads.values())
        return [], 0


def _words(error: BaseException | None) -> str:
    """What ended an attempt for dask: a worker that was lost too often, or one that cannot run jobs at all."""
    kind = type(error).__name__
    if kind == "KilledWorker":
        return "its workers were lost, several times; is there enough memory?"
    return f"the worker cannot run it: {kind}: {str(error).splitlines()[0] if str(error) else ''}"


def _distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise MissingDependencyError("sweeps run on dask.distributed, which is not installed; pip install 'elmexport[sweep]'") from None
    return distributed
