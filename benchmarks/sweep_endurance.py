"""Sweeps under test: the same bytes and figures as single commands, kills at random moments, time against the ideal, cost of a cell.

    python benchmarks/sweep_endurance.py same  --folder /tmp/sweep            # 24 cells on `tiny`, 2 workers, and the same 24 as single commands
    python benchmarks/sweep_endurance.py kills --folder /tmp/sweep --runs 20  # the same, with processes killed -9 at random moments
    python benchmarks/sweep_endurance.py cost  --folder /tmp/sweep            # empty cells, 10 to 1,000

`same` keeps its single commands in the folder, and `kills` compares with them. All time is given as CPU seconds too, of a process and all that it
started: on a machine that does other work, wall time says little. Use as many threads in both: OMP_NUM_THREADS=1 ELMEXPORT_THREADS=1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from elmexport.sweep.cell import Planned
from elmexport.sweep.engine import local_client, run_jobs
from elmexport.sweep.expansion import expand
from elmexport.sweep.folder import open_folder
from elmexport.sweep.jobs import Job, Kind, Outcome
from elmexport.sweep.plan import read_plan

PLAN = """models = ["tiny"]
formats = ["onnx", "gguf", "mlx", "coreml"]
quants = ["int8", "int4"]
methods = ["mse", "gptq", "rtn"]
tokens = 2048
tasks = ["cloze"]
limit = 20
text_tokens = 1024
"""
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("same", "kills", "cost"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--plan", type=Path, help="another plan than the one with 24 cells")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.toml"
    plan.write_text(PLAN if arguments.plan is None else arguments.plan.read_text(encoding="utf-8"), encoding="utf-8")
    if arguments.what == "same":
        same(folder, plan)
    elif arguments.what == "kills":
        kills(folder, plan, arguments.runs)
    else:
        cost(folder)


def same(folder: Path, plan: Path) -> None:
    """A sweep, and its commands one by one, with a cache of their own: bytes, figures, time."""
    single, swept = folder / "single", folder / "swept"
    for path in (single, swept):
        shutil.rmtree(path, ignore_errors=True)
    cells = [each.job for each in expand(read_plan(plan), plan, swept).jobs if each.job.kind is Kind.CELL]
    spent = 0.0
    for job in cells:
        (single / job.key).mkdir(parents=True)
        environment = os.environ | {"ELMEXPORT_CACHE": str(single / "cache")}
        for step in job.steps:
            before = cpu()
            subprocess.run([sys.executable, *step.arguments], cwd=single / job.key, env=environment, check=True, capture_output=True)
            spent += cpu() - before
    before, started = cpu(), time.monotonic()
    run_sweep(plan, swept)
    took, wall = cpu() - before, time.monotonic() - started
    differing = [job.label for job in cells if contents(single / job.key) != contents(swept / Kind.CELL / job.key)]
    print(f"{len(cells)} cells; differing from single commands: {differing or 'none'}")
    print(
        f"single commands: {spent:.0f} CPU s; sweep: {took:.0f} CPU s, {took / spent:.3f} times as much; wall {wall:.0f} s with {WORKERS} workers,"
    )
    print(
        f"{wall / (spent / WORKERS):.2f} times the single commands' CPU time shared by {WORKERS} (ideal: 1; load average {os.getloadavg()[0]:.1f})"
    )


def kills(folder: Path, plan: Path, runs: int) -> None:
    """Sweeps of which processes are killed at random moments: any worker, job or step, or the whole sweep, which is then started again."""
    single = folder / "single"
    outcomes = []
    for run in range(runs):
        chance, swept = random.Random(run), folder / f"killed-{run}"
        shutil.rmtree(swept, ignore_errors=True)
        killed, starts = 0, 0
        while True:
            starts += 1
            sweep = subprocess.Popen(sweep_command(plan, swept), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            said: list[str] = []
            reader = threading.Thread(target=lambda pipe=sweep.stderr, said=said: said.extend(pipe))
            reader.start()
            while sweep.poll() is None:
                time.sleep(chance.uniform(2, 20))
                victim = chosen(sweep, chance)
                if victim is not None and killed < 6:
                    victim.kill()
                    killed += 1
            reader.join()
            if sweep.returncode == 0:
                break
        cells = list((swept / "cells").iterdir())
        differing = [path.name for path in cells if contents(path) != contents(single / path.name)]
        left = [path.name for path in (swept / "work").iterdir()]
        outcomes.append(not differing and len(cells) == len(list(single.glob("[0-9a-f]*"))) and not left)
        print(
            f"run {run + 1}: {killed} processes killed, started {starts} times, {len(cells)} cells, differing: {differing or 'none'}, left over: {left or 'none'}",
            flush=True,
        )
        shutil.rmtree(swept)
    print(f"{sum(outcomes)} of {runs} runs gave the same bytes and figures as single commands")


def chosen(sweep: subprocess.Popen[str], chance: random.Random) -> psutil.Process | None:
    """A process of the sweep, the sweep itself once in ten times."""
    try:
        own = psutil.Process(sweep.pid)
        below = [process for process in own.children(recursive=True) if "resource_tracker" not in " ".join(process.cmdline())]
        return own if chance.random() < 0.1 else chance.choice(below)
    except (psutil.Error, IndexError):
        return None


def cost(folder: Path) -> None:
    """Time of empty cells, each a process that writes a folder, and what of it the sweep's own process takes."""
    print("| cells | wall s | s per cell | CPU ms per cell, all | CPU ms per cell, sweep and scheduler | memory of the sweep, MB |")
    print("|---:|---:|---:|---:|---:|---:|")
    for count in (10, 100, 1000):
        out = folder / f"empty-{count}"
        shutil.rmtree(out, ignore_errors=True)
        sweep = open_folder(out, "")
        jobs = [
            Planned(Job(f"{number:020x}", f"empty {number}", Kind.CELL, str(out), (), {}, sweep=sweep, threads=1))
            for number in range(count)
        ]
        with local_client(WORKERS) as client:
            run_jobs(client, [Planned(Job("f" * 20, "first", Kind.CELL, str(out), (), {}, sweep=sweep, threads=1))], Silent())
            own, everything, started = time.process_time(), tree_cpu(), time.monotonic()
            run_jobs(client, jobs, Silent())
            wall, own, everything = time.monotonic() - started, time.process_time() - own, tree_cpu() - everything
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(
            f"| {count:,} | {wall:.1f} | {wall / count:.3f} | {1e3 * everything / count:.0f} | {1e3 * own / count:.1f} | {peak:.0f} |",
            flush=True,
        )
        shutil.rmtree(out)


class Silent:
    def ended(self, job: Job, outcome: Outcome) -> None:
        assert outcome.state == "done", outcome

    def retried(self, job: Job, outcome: Outcome) -> None:
        pass

    def lost(self) -> None:
        pass

    def tick(self, running: Sequence[str]) -> None:
        pass


def sweep_command(plan: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "elmexport", "sweep", str(plan), "--out", str(out), "--workers", str(WORKERS), "--retries", "6"]


def run_sweep(plan: Path, out: Path) -> None:
    subprocess.run(sweep_command(plan, out), check=True, stdout=subprocess.DEVNULL)


def contents(cell: Path) -> dict[str, Any]:
    """Hashes of the artifact's files, and the figures of every report: all but how long it took."""
    found: dict[str, Any] = {}
    for path in files(cell):
        name = path.relative_to(cell).as_posix()
        if name.startswith("eval-") and "/" not in name:
            report = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {key: value for key, value in report.items() if key != "seconds"}
        elif "/" in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def cpu() -> float:
    """CPU seconds of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree_cpu() -> float:
    """CPU seconds of this process and those below it, and of those below them that have ended."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


if __name__ == "__main__":
    main()
