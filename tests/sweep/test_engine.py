"""Sweeps on real workers: retries, workers and schedulers that are killed, cells that take all memory, folders that a worker does not see.

The jobs are small programs instead of exports, so that what is tested is what carries them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from elmexport.errors import ElmExportError
from elmexport.sweep import engine
from elmexport.sweep.cell import Planned
from elmexport.sweep.engine import local_client, remote_client, run_jobs
from elmexport.sweep.folder import is_done, read_result
from elmexport.sweep.jobs import Job, Kind, Outcome, State
from tests.sweep.conftest import MakeJob, python

pytestmark = pytest.mark.slow

WRITE = "import os; open('made', 'w').write(os.environ['ELMEXPORT_THREADS'] + ' ' + os.environ['ELMEXPORT_CACHE'])"


class Heard:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.again: list[str] = []
        self.gone = 0
        self.seen: set[str] = set()
        self.most = 0

    def ended(self, job: Job, outcome: Outcome) -> None:
        pass

    def retried(self, job: Job, outcome: Outcome) -> None:
        self.again.append(job.key)

    def lost(self) -> None:
        self.gone += 1

    def tick(self, running: Sequence[str], places: int) -> None:
        self.seen |= set(running)
        self.most = max(self.most, len(running))
        assert len(running) <= places or places == 0


def states(outcomes: dict[str, Outcome]) -> dict[str, State]:
    return {key: outcome.state for key, outcome in outcomes.items()}


def wait_for(path: Path) -> None:
    wait_until(path.exists)


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for a condition; gives up after a minute."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "waited a minute"
        time.sleep(0.05)


def wait_for_end(pid: int) -> None:
    """Wait until a process is gone; gives up after a minute."""
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def sleeper(started: Path, go: Path) -> str:
    """A program that says that it runs, and ends when it is told to. Each attempt leaves a line."""
    return python(
        "import os, pathlib, time",
        f"with open({str(started)!r}, 'a') as file: file.write(f'{{os.getpid()}}\\n')",
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)",
    )


def test_a_sweep_of_everything_that_can_happen(make_job: MakeJob, tmp_path: Path) -> None:
    """One failure of each kind, beside cells that succeed; and a second run, which does only what is missing."""
    once, out = tmp_path / "once", tmp_path / "out"
    crash_once = python(
        "import os, signal, pathlib",
        f"path = pathlib.Path({str(once)!r})",
        "if not path.exists(): path.touch(); os.kill(os.getpid(), signal.SIGKILL)",
    )
    jobs = [
        make_job("reference", WRITE, kind=Kind.REFERENCE),
        make_job("good", WRITE, after="reference"),
        make_job("empty"),
        make_job("bad", "import sys; print('error: no such quant', file=sys.stderr); sys.exit(2)"),
        make_job("fault", "raise RuntimeError('a fault')"),
        make_job("killed once", crash_once),
        make_job("greedy", "x = bytearray(600_000_000); import time; time.sleep(60)", memory=300_000_000),
        make_job("other versions", WRITE, packages={"elmexport": "0.0.1"}),
        make_job("broken", "import sys; print('error: no tokenizer', file=sys.stderr); sys.exit(3)", kind=Kind.REFERENCE),
        make_job("without reference", WRITE, after="broken"),
    ]  # fmt: skip
    heard = Heard()
    with local_client(2) as client:
        outcomes = run_jobs(client, jobs, heard, retries=1)
        assert states(outcomes) == {
            **dict.fromkeys(("reference", "good", "empty", "killed once"), State.DONE),
            **dict.fromkeys(("bad", "other versions", "broken", "without reference"), State.FAILED),
            **dict.fromkeys(("fault", "greedy"), State.CRASHED),
        }
        assert sorted(heard.again) == ["fault", "greedy", "killed once"]
        said = {key: outcome.message for key, outcome in outcomes.items()}
        assert said["bad"] == "run: no such quant" and outcomes["bad"].code == 2 and outcomes["bad"].attempts == 1
        assert said["fault"] == "run: exit code 1 (RuntimeError: a fault)" and outcomes["fault"].attempts == 2
        assert said["greedy"].startswith("run: out of memory: ") and "0.30 GB allowed" in said["greedy"]
        assert "the sweep 0.0.1: install the same versions" in said["other versions"]
        assert said["without reference"] == "not run: job broken failed"
        assert (out / "cells" / "good" / "made").read_text() == f"1 {out / 'shared'}"
        assert read_result(out / "cells" / "killed once").outcome.state is State.DONE
        assert "a fault" in (out / "failures" / "fault.txt").read_text()
        assert not list((out / "work").iterdir())
        mended = [make_job("bad", WRITE), *(job for job in jobs if job.job.key in ("good", "empty", "fault"))]
        before = (out / "cells" / "good" / "result.json").stat().st_mtime_ns
        assert states(run_jobs(client, mended, Heard(), retries=0)) == {"bad": State.DONE, "fault": State.CRASHED}
        assert (out / "cells" / "good" / "result.json").stat().st_mtime_ns == before
        assert [path.name for path in (out / "failures").iterdir() if path.stem in ("bad", "fault")] == ["fault.txt"]


def test_a_worker_that_is_killed_takes_its_cell_along_and_another_does_it(make_job: MakeJob, tmp_path: Path) -> None:
    started, go = tmp_path / "started", tmp_path / "go"

    def kill() -> None:
        wait_for(started)
        step = psutil.Process(int(started.read_text().split()[0]))
        job, worker = step.parents()[:2]
        worker.kill()
        for process in (job, step):
            with contextlib.suppress(psutil.Error):
                process.wait(10)  # they see that it is gone
        killed.extend([process for process in (job, step) if process.is_running() and process.status() != psutil.STATUS_ZOMBIE])
        go.touch()

    killed: list[psutil.Process] = []
    with local_client(1) as client:
        thread = threading.Thread(target=kill)
        thread.start()
        outcomes = run_jobs(client, [make_job("a", sleeper(started, go)), make_job("b", WRITE)], Heard(), retries=0)
        thread.join()
    assert killed == []
    assert states(outcomes) == {"a": State.DONE, "b": State.DONE}
    assert len(started.read_text().split()) == 2
    assert not list((tmp_path / "out" / "work").iterdir())


class Cluster:
    """A dask scheduler and a worker as the processes that a cluster would have."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *arguments, "--no-dashboard"]
        with (self._folder / f"{len(self._processes)}.log").open("wb") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True))
        return self._processes[-1]

    def scheduler(self) -> subprocess.Popen[bytes]:
        return self.start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port))

    def worker(self, *arguments: str) -> subprocess.Popen[bytes]:
        return self.start(
            "distributed.cli.dask_worker", self.address, "--nthreads", "1", "--local-directory", str(self._folder), *arguments
        )

    def end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    yield found
    found.end()


def test_a_scheduler_that_is_killed_and_started_again(make_job: MakeJob, cluster: Cluster, tmp_path: Path) -> None:
    """What was finished is kept, what ran is run again, by a worker that was started again with it; its memory limit is the worker's."""
    started, go, heard = tmp_path / "started", tmp_path / "go", Heard()
    scheduler = cluster.scheduler()
    cluster.worker("--memory-limit", "400MB")

    def restart() -> None:
        wait_for(started)
        wait_until(lambda: "a" in heard.seen)
        scheduler.kill()
        scheduler.wait()
        cluster.scheduler()
        cluster.worker("--memory-limit", "400MB")
        wait_for_end(int(started.read_text()))  # its worker ends it before it ends itself
        go.touch()

    jobs = [
        make_job("first", WRITE),
        make_job("a", sleeper(started, go), after="first"),
        make_job("greedy", "x = bytearray(600_000_000); import time; time.sleep(60)", after="a"),
    ]
    with remote_client(cluster.address) as client:
        thread = threading.Thread(target=restart)
        thread.start()
        outcomes = run_jobs(client, jobs, heard, retries=0)
        thread.join()
    assert states(outcomes) == {"first": State.DONE, "a": State.DONE, "greedy": State.CRASHED}
    assert "0.40 GB allowed" in outcomes["greedy"].message
    assert heard.gone == 1 and len(started.read_text().split()) == 2 and "a" in heard.seen
    assert is_done(tmp_path / "out", Kind.CELL, "first")


def test_a_scheduler_that_does_not_come_back(make_job: MakeJob, cluster: Cluster, tmp_path: Path) -> None:
    started = tmp_path / "started"
    scheduler = cluster.scheduler()
    cluster.worker()

    def kill() -> None:
        wait_for(started)
        scheduler.kill()

    with remote_client(cluster.address) as client:
        thread = threading.Thread(target=kill)
        thread.start()
        with pytest.raises(ElmExportError, match="the dask scheduler went and did not come back"):
            run_jobs(client, [make_job("a", sleeper(started, tmp_path / "never"))], Heard(), patience=1)
        thread.join()
    wait_for_end(int(started.read_text()))


def test_a_worker_that_does_not_see_the_folder(make_job: MakeJob, tmp_path: Path) -> None:
    """As on a machine that does not share the file system: the folder is not there, or is another one."""
    job, away = make_job("a", WRITE), tmp_path / "away"
    shutil.move(tmp_path / "out", away)
    with local_client(1) as client:
        outcome = run_jobs(client, [job], Heard())["a"]
        assert outcome.state is State.FAILED and "on a file system that all share" in outcome.message and outcome.attempts == 1
        assert not (tmp_path / "out").exists()
        other: Planned = make_job("a", WRITE)
        (tmp_path / "out" / "sweep.json").write_text('{"schema": 1, "id": "another"}')
        outcome = run_jobs(client, [other], Heard())["a"]
        assert outcome.state is State.FAILED and "is not the sweep's folder" in outcome.message


def test_no_scheduler_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ANSWER", 0.5)
    with pytest.raises(ElmExportError, match=r"no dask scheduler answers at --scheduler tcp://127\.0\.0\.1:9 .*start one with `dask scheduler`"), remote_client("tcp://127.0.0.1:9"):  # fmt: skip
        pass
