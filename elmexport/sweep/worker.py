"""Work of a dask worker: one job at a time in each of its threads, as a process of its own. Imports nothing heavy: workers stay small."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys

import msgspec

from elmexport.cores import asked_threads, available_cores
from elmexport.sweep.jobs import Job, Outcome, State


def run_job(document: bytes) -> bytes:
    """Run the `Job` in `document` in a process of its own, and return its `Outcome`; both as JSON."""
    job = _with_share(msgspec.json.decode(document, type=Job))
    process = subprocess.Popen(
        [sys.executable, "-m", "elmexport.sweep.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it ended before it began; the exit code tells
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            process.stdin.flush()
        said = process.stdout.read()  # to its end; standard input stays open until then, see `elmexport.sweep.process`
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.killpg(process.pid, signal.SIGKILL)  # what a killed process may have left behind
        process.stdin.close()
    if code == 0 and said.endswith(b"\n"):
        return said
    how = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
    last = process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
    return msgspec.json.encode(Outcome(job.key, State.CRASHED, ": ".join([how, *last]), code, host=platform.node()))


def _with_share(job: Job) -> Job:
    """`job` with this worker's share of threads and memory, where the sweep did not set them."""
    from distributed import get_worker

    worker = get_worker()
    slots = worker.state.nthreads
    threads, memory = job.threads, job.memory
    if threads is None:
        threads = asked_threads() or max(1, available_cores() // slots)
    if memory is None and worker.memory_manager.memory_limit is not None:
        memory = int(worker.memory_manager.memory_limit) // slots
    return msgspec.structs.replace(job, threads=threads, memory=memory)
