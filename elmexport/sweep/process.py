"""Process of one job: runs its steps, watches their memory, ends when its worker does, and leaves a complete folder or none.

    python -m elmexport.sweep.process < job

The job is one line of JSON on standard input, which stays open: where it ends, the worker is gone, and the job with it. The outcome is one line
of JSON on standard output. Started as the leader of a process group of its own, which holds all that its steps start.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import psutil

from elmexport import __version__
from elmexport.cores import VARIABLE
from elmexport.errors import ElmExportError
from elmexport.files import write_text
from elmexport.sweep.folder import FAILURES, LOG, RESULT, SHARED, WORK, is_done, read_marker
from elmexport.sweep.jobs import Job, Outcome, Result, State, Step

POLL = 0.2  # seconds between two looks at the memory
_FINAL_CODES = (1, 2, 3)  # exit codes that say what was wrong; see `elmexport.errors`
_TRACEBACK = "Traceback (most recent call last):"


def main() -> None:
    """Run the job on standard input."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_worker, daemon=True).start()
    with contextlib.suppress(OSError):  # where memory runs out, the kernel is to take this and not the worker
        Path("/proc/self/oom_score_adj").write_text("800")
    sys.stdout.buffer.write(msgspec.json.encode(run(job)) + b"\n")
    sys.stdout.flush()


def run(job: Job) -> Outcome:
    """Run `job` to its end, whatever that is."""
    folder = Path(job.folder)
    reason = _unfit(job, folder)
    if reason is not None:
        return Outcome(job.key, State.FAILED, reason, code=3, host=platform.node())
    if is_done(folder, job.kind, job.key):  # by an attempt that was given up too early
        return Outcome(job.key, State.DONE, host=platform.node())
    work = folder / WORK / f"{job.key}-{uuid.uuid4().hex[:8]}"
    try:
        for other in (folder / WORK).glob(f"{job.key}-*"):  # of attempts that were killed
            shutil.rmtree(other, ignore_errors=True)
        work.mkdir(parents=True)
        outcome = _Run(job, work).outcome()
        if outcome.state is State.DONE:
            _keep(job, work, outcome)
        else:
            shutil.copyfile(work / LOG, folder / FAILURES / f"{job.key}.txt")
        return outcome
    except OSError as error:
        return Outcome(job.key, State.CRASHED, f"cannot write {folder}: {error.strerror or error}", host=platform.node())
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unfit(job: Job, folder: Path) -> str | None:
    """Say why this machine cannot do `job`; None if it can."""
    host = platform.node()
    try:
        seen = read_marker(folder).id
    except ElmExportError:
        return f"{host} does not see {folder}: workers need the sweep's folder under the same path, on a file system that all share"
    if seen != job.sweep:
        return f"{folder} on {host} is not the sweep's folder, but that of another sweep: workers need a file system that all share"
    for package, wanted in job.packages.items():
        found = _version(package)
        if found != wanted:
            return f"{host} has {package} {found}, the sweep {wanted}: install the same versions on every machine"
    return None


def _version(package: str) -> str:
    if package == "elmexport":
        return __version__
    if package == "python":
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _keep(job: Job, work: Path, outcome: Outcome) -> None:
    """Give a finished job its place; where another attempt was faster, its results stay."""
    write_text(work / RESULT, msgspec.json.encode(Result(label=job.label, facts=job.facts, outcome=outcome)).decode() + "\n")
    folder = Path(job.folder)
    with contextlib.suppress(OSError) if is_done(folder, job.kind, job.key) else contextlib.nullcontext():
        work.rename(folder / job.kind / job.key)
    (folder / FAILURES / f"{job.key}.txt").unlink(missing_ok=True)


class _Run:
    """The steps of a job, one after the other."""

    def __init__(self, job: Job, work: Path) -> None:
        self._job, self._work = job, work
        self._seconds: dict[str, float] = {}
        self._peak = 0
        self._environment = {**os.environ, "ELMEXPORT_CACHE": str(Path(job.folder) / SHARED), "PYTHONUNBUFFERED": "1"}
        if job.threads is not None:
            self._environment |= {VARIABLE: str(job.threads), "OMP_NUM_THREADS": str(job.threads)}

    def outcome(self) -> Outcome:
        with (self._work / LOG).open("ab") as log:
            for step in self._job.steps:
                started = time.monotonic()
                with contextlib.ExitStack() as files:
                    out = log if step.stdout is None else files.enter_context((self._work / step.stdout).open("wb"))
                    start = log.tell()
                    process = subprocess.Popen(
                        [sys.executable, *step.arguments],
                        cwd=self._work,
                        env=self._environment,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=log,
                    )
                    exceeded = self._watched(process)
                self._seconds[step.name] = round(time.monotonic() - started, 2)
                if exceeded is not None:
                    return self._ended(State.CRASHED, f"{step.name}: {exceeded}", process.returncode)
                if process.returncode:
                    return self._judged(step, process.returncode, start)
        return self._ended(State.DONE, "", 0)

    def _watched(self, process: subprocess.Popen[bytes]) -> str | None:
        """Wait for a step; says by how much it passed its memory, for which it was killed, or None."""
        own, below = psutil.Process(process.pid), list[psutil.Process]()
        look = -1
        while True:
            look += 1
            try:
                process.wait(POLL)
                return None
            except subprocess.TimeoutExpired:
                if look % 5 == 0:  # finding them looks at every process of the machine
                    below = _children(own)
                used = _memory([own, *below])
            self._peak = max(self._peak, used)
            if self._job.memory is not None and used > self._job.memory:
                for child in [*_children(own), own]:
                    with contextlib.suppress(psutil.Error):
                        child.kill()
                process.wait()
                return (
                    f"out of memory: {used / 1e9:.2f} GB in use, {self._job.memory / 1e9:.2f} GB allowed; give workers more, or run fewer"
                )

    def _judged(self, step: Step, code: int, start: int) -> Outcome:
        """The outcome of a step that failed, from its exit code and what it wrote into the log."""
        said = (self._work / LOG).read_bytes()[start:].decode(errors="replace")
        lines = [line for line in said.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        last = (errors or lines or [""])[-1]
        if code in _FINAL_CODES and _TRACEBACK not in said:
            return self._ended(State.FAILED, f"{step.name}: {last}", code)
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return self._ended(State.CRASHED, f"{step.name}: {how}" + (f" ({last})" if _TRACEBACK in said else ""), code)

    def _ended(self, state: State, message: str, code: int) -> Outcome:
        return Outcome(self._job.key, state, message, code, self._seconds, self._peak, platform.node())


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _memory(processes: Sequence[psutil.Process]) -> int:
    """Bytes that processes use, without pages of files that the system can take back."""
    total = 0
    for one in processes:
        with contextlib.suppress(psutil.Error):
            info = one.memory_info()
            total += info.rss - getattr(info, "shared", 0)
    return total


def _end_with_worker() -> None:
    """End this process and all that it started when standard input, which the worker holds, does."""
    while os.read(0, 1):  # not through the buffered file, whose lock a thread that waits would hold to the end
        pass
    if hasattr(os, "killpg"):
        os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
