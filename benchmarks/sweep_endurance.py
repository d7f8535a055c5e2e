"""Sweeps under test: the same bytes and figures as single commands, kills at random moments, time against the ideal, cost of a cell.

    python benchmarks/sweep_endurance.py same  --folder /tmp/sweep            # 24 cells on `tiny`, 2 workers, and the same 24 as single commands
    python benchmarks/sweep_endurance.py kills --folder /tmp/sweep --runs 20  # the same, with processes killed -9 at random moments
    python benchmarks/sweep_endurance.py programs --folder /tmp/sweep         # kills again, 24 small programs in the place of exports: minutes
    python benchmarks/sweep_endurance.py cost  --folder /tmp/sweep            # empty cells, 10 to 10,000

`same` keeps its single commands in the folder, and `kills` compares with them. All time is given as CPU seconds too, of a process and all that it
started: on a machine that does other work, wall time says little. Use as many threads in both: OMP_NUM_THREADS=1 ELMEXPORT_THREADS=1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil

from elmexport.sweep import engine
from elmexport.sweep.cell import Planned
from elmexport.sweep.engine import local_client, run_jobs
from elmexport.sweep.expansion import expand
from elmexport.sweep.folder import open_folder
from elmexport.sweep.jobs import Job, Kind, Outcome, State, Step
from elmexport.sweep.plan import read_plan
from elmexport.sweep.worker import run_job

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
KILLS = 6  # in one run
SPENT = "cpu-seconds"  # file beside a single command's results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("same", "kills", "programs", "cost", "run-programs"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--most", type=int, default=10_000, help="cells of the largest simulation")
    parser.add_argument("--plan", type=Path, help="another plan than the one with 24 cells")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    if arguments.what == "run-programs":
        run_programs(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.toml"
    plan.write_text(PLAN if arguments.plan is None else arguments.plan.read_text(encoding="utf-8"), encoding="utf-8")
    if arguments.what == "same":
        same(folder, plan)
    elif arguments.what == "kills":
        kills(folder, arguments.runs, lambda out: sweep_command(plan, out), folder / "single")
    elif arguments.what == "programs":
        run_programs(folder / "programs")
        kills(folder, arguments.runs, programs_command, folder / "programs" / Kind.CELL)
    else:
        cost(folder, arguments.most)


def same(folder: Path, plan: Path) -> None:
    """A sweep, and its commands one by one, with a cache of their own: bytes, figures, time. Goes on where it was interrupted."""
    single, swept = folder / "single", folder / "swept"
    cells = [each.job for each in expand(read_plan(plan), plan, swept).jobs if each.job.kind is Kind.CELL]
    for job in cells:
        if not (single / job.key / SPENT).is_file():
            before = cpu()
            run_singly(job, single)
            (single / job.key / SPENT).write_text(str(cpu() - before))
    spent = sum(float((single / job.key / SPENT).read_text()) for job in cells)
    fresh, before, started = not swept.exists(), cpu(), time.monotonic()
    subprocess.run(sweep_command(plan, swept), check=True, stdout=subprocess.DEVNULL)
    took, wall = cpu() - before, time.monotonic() - started
    differing = [job.label for job in cells if contents(single / job.key) != contents(swept / Kind.CELL / job.key)]
    print(f"{len(cells)} cells; differing from single commands: {differing or 'none'}; single commands: {spent:.0f} CPU s")
    if fresh:
        print(
            f"sweep: {took:.0f} CPU s, {took / spent:.3f} times as much; wall {wall:.0f} s with {WORKERS} workers, {wall / (spent / WORKERS):.2f} times"
        )
        print(f"the single commands' CPU time shared by {WORKERS} (load average at the end {os.getloadavg()[0]:.1f})")
        pooled, before, started = folder / "pooled", cpu(), time.monotonic()
        shutil.rmtree(pooled, ignore_errors=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda job: run_singly(job, pooled), cells))
        took, ideal = cpu() - before, time.monotonic() - started
        print(
            f"the single commands, {WORKERS} at a time: {took:.0f} CPU s, wall {ideal:.0f} s; the sweep took {wall / ideal:.2f} times as long"
        )


def run_singly(job: Job, folder: Path) -> None:
    """Run the commands of a cell as one would type them, in a folder of its own and with a cache that all share."""
    cell = folder / job.key
    shutil.rmtree(cell, ignore_errors=True)
    cell.mkdir(parents=True)
    environment = os.environ | {"ELMEXPORT_CACHE": str(folder / "cache")}
    for step in job.steps:
        subprocess.run([sys.executable, *step.arguments], cwd=cell, env=environment, check=True, capture_output=True)


def kills(folder: Path, runs: int, command: Callable[[Path], list[str]], wanted: Path) -> None:
    """Sweeps of which processes are killed at random moments: any worker, job or step, or the whole sweep, which is then started again.

    `wanted` holds what a sweep without kills leaves.
    """
    outcomes = []
    for run in range(runs):
        chance, swept = random.Random(run), folder / f"killed-{run}"
        shutil.rmtree(swept, ignore_errors=True)
        killed, starts = 0, 0
        while True:
            starts += 1
            with (folder / f"killed-{run}.log").open("ab") as log:
                sweep = subprocess.Popen(command(swept), stdout=log, stderr=log)
            while sweep.poll() is None:
                time.sleep(chance.uniform(1, 15))
                victim = chosen(sweep, chance) if killed < KILLS else None
                if victim is not None:
                    with contextlib.suppress(psutil.Error):
                        victim.kill()
                        killed += 1
            if sweep.returncode == 0:
                break
        cells = list((swept / "cells").iterdir())
        differing = [path.name for path in cells if contents(path) != contents(wanted / path.name)]
        left = [path.name for path in (swept / "work").iterdir()]
        outcomes.append(not differing and len(cells) == len([path for path in wanted.iterdir() if path.name != "cache"]) and not left)
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


def run_programs(out: Path) -> None:
    """24 programs that take some seconds and write a file each, in three groups and after a reference."""
    sweep = open_folder(out, "")
    code = "import time; time.sleep({0}); open('made', 'w').write('{0}' * 100000)"

    def program(number: int, kind: Kind = Kind.CELL) -> Job:
        step = Step("run", ("-c", code.format(1 + number % 3)))
        return Job(f"{number:020x}", f"program {number}", kind, str(out), (step,), {}, sweep=sweep, threads=1)

    reference = program(99, Kind.REFERENCE)
    jobs = [Planned(program(number), reference.key, (str(number % 3),) if number % 2 else ()) for number in range(24)]
    with local_client(WORKERS) as client:
        outcomes = run_jobs(client, [Planned(reference), *jobs], Silent(), retries=KILLS)
    assert all(outcome.state is State.DONE for outcome in outcomes.values())


def programs_command(out: Path) -> list[str]:
    return [sys.executable, __file__, "run-programs", "--folder", str(out)]


def cost(folder: Path, most: int) -> None:
    """Cost of a cell that does nothing: of what hands it out alone (no process), and with its process, which writes a folder."""
    print(
        "| cells | with a process | wall ms per cell | CPU ms per cell, all processes | CPU ms per cell, sweep and scheduler | peak of the sweep, MB |"
    )
    print("|---:|---|---:|---:|---:|---:|")
    for task, counts in ((nothing, (10, 100, 1000, 10_000)), (run_job, (10, 100, 1000))):
        for count in counts:
            if count <= most:
                cost_of(folder / f"empty-{count}", count, task)


def cost_of(out: Path, count: int, task: Callable[[bytes], bytes]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    sweep = open_folder(out, "")

    def job(number: int) -> Planned:
        return Planned(Job(f"{number:020x}", f"empty {number}", Kind.CELL, str(out), (), {}, sweep=sweep, threads=1))

    engine.run_job = task
    with local_client(WORKERS) as client:
        run_jobs(client, [job(count)], Silent())  # imports
        own, everything, started = time.process_time(), tree_cpu(), time.monotonic()
        run_jobs(client, [job(number) for number in range(count)], Silent())
        wall, own, everything = time.monotonic() - started, time.process_time() - own, tree_cpu() - everything
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    each = 1e3 / count
    print(
        f"| {count:,} | {'yes' if task is run_job else 'no'} | {each * wall:.0f} | {each * everything:.0f} | {each * own:.1f} | {peak:.0f} |",
        flush=True,
    )
    shutil.rmtree(out)


def nothing(document: bytes) -> bytes:
    """Stand in for `run_job`."""
    return msgspec.json.encode(Outcome(msgspec.json.decode(document, type=Job).key, State.DONE))


class Silent:
    def ended(self, job: Job, outcome: Outcome) -> None:
        assert outcome.state == "done", outcome

    def retried(self, job: Job, outcome: Outcome) -> None:
        pass

    def lost(self) -> None:
        pass

    def tick(self, running: Sequence[str], places: int) -> None:
        pass


def sweep_command(plan: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "elmexport", "sweep", str(plan), "--out", str(out), "--workers", str(WORKERS), "--retries", str(KILLS)]


def contents(cell: Path) -> dict[str, Any]:
    """Hashes of the artifact's files, and the figures of every report: all but how long it took."""
    found: dict[str, Any] = {}
    for path in files(cell):
        name = path.relative_to(cell).as_posix()
        if name.startswith("eval-") and "/" not in name:
            report = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {key: value for key, value in report.items() if key != "seconds"}
        elif "/" in name or name == "made":
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
