"""Work of a dask worker: one job at a time in each of its threads, as a process of its own. Imports nothing heavy: workers stay small."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from elmexport.cores import asked_threads, available_cores
from elmexport.sweep.jobs import Job, Outcome, State

_POLL = 0.5  # seconds between two looks at the worker
_CLOSING = ("closing", "closed", "failed")  # of `distributed.Status`


def run_job(document: bytes) -> bytes:
    """Run the `Job` in `document` in a process of its own, and return its `Outcome`; both as JSON.

    Raises:
        ChildProcessError: the worker is closing, and the job was ended.
    """
    from distributed import get_worker

    worker = get_worker()
    job = _with_share(msgspec.json.decode(document, type=Job), worker)
    process = subprocess.Popen(
        [sys.executable, "-m", "elmexport.sweep.process"],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with process.stdin, process.stdout, process.stderr:  # standard input stays open to the end, see `elmexport.sweep.process`
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended before it began; the exit code tells
                process.stdin.write(msgspec.json.encode(job) + b"\n")
                process.stdin.flush()
            while not _ended(process):
                if worker.status.name in _CLOSING:  # it would wait for this thread, and the job go on though its scheduler is gone
                    raise ChildProcessError(f"the worker is closing; {job.label} was ended")
        finally:
            with contextlib.suppress(ProcessLookupError, AttributeError):
                os.killpg(process.pid, signal.SIGKILL)  # the process, or what it left behind if it was killed
            code = process.wait()
        said = process.stdout.read()
        if code == 0 and said.endswith(b"\n"):
            return said
        last = process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
    how = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
    return msgspec.json.encode(Outcome(job.key, State.CRASHED, ": ".join([how, *last]), code, host=platform.node()))


def _environment() -> dict[str, str]:
    """This worker's environment without what dask sets for work within it: threads, and an allocator that gives every page back at once."""
    import dask

    own: Mapping[str, object] = dask.config.get("distributed.nanny.pre-spawn-environ")
    return {name: value for name, value in os.environ.items() if name not in own or value != str(own[name])}


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Wait a little; whether the process has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_POLL)
        return True
    return False


def _with_share(job: Job, worker: Any) -> Job:
    """`job` with this worker's share of threads and memory, where the sweep did not set them."""
    slots = worker.state.nthreads
    threads, memory = job.threads, job.memory
    if threads is None:
        threads = asked_threads() or max(1, available_cores() // slots)
    if memory is None and worker.memory_manager.memory_limit is not None:
        memory = int(worker.memory_manager.memory_limit) // slots
    return msgspec.structs.replace(job, threads=threads, memory=memory)
