"""kill -9 at random moments: nothing that looks finished may be left unfinished, and the next run must give what an undisturbed one gives.

    python -m tests.endurance.kill --count 100 [--command export|calibrate|eval|sweep]

Commands run in forks of a process that has loaded everything, and are killed after a random part of the processor time that an undisturbed run
takes. Each goes on, in the same place and with the same cache, from what the killed one before it left. A sweep runs as it is, and any of its processes
is killed: a job's, a worker's, or the sweep's own, which is then started again. Prints a JSON line a command: kills, runs
that came to their end, and the largest difference of a score from the undisturbed run's (files must be the same to the byte). Exit code 1 where
something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sweep_endurance import KILLS, chosen, contents, sweep_command
from elmexport.models import trace
from tests.endurance.corpus import EXPORTS, run, small_config
from tests.endurance.fuzz import build_corpus, cpu_seconds

RAISED = 99  # exit code
_SETTINGS = {"OMP_NUM_THREADS": "1", "ELMEXPORT_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Work:
    """A command, and how to look at what it wrote: `result` of the place given is what two runs are to agree in."""

    commands: Callable[[Path, Path], Sequence[Sequence[str]]]  # by the corpus and the place
    result: Callable[[Path], Any]


def _exports(corpus: Path, out: Path) -> Sequence[Sequence[str]]:
    common = ("--model", str(corpus / "model"), "--out", str(out), "--no-verify")
    return [(target, "--quant", quant, *common) for target, quant in EXPORTS.values()]


def _calibrations(corpus: Path, out: Path) -> Sequence[Sequence[str]]:
    common = ("--model", str(corpus / "model"), "--text", str(corpus / "text.txt"), "--tokens", "512", "--window", "64", "--hessian")
    return [("calibrate", *common, "--out", str(out))]


def _evaluations(corpus: Path, out: Path) -> Sequence[Sequence[str]]:
    tasks = ("--data", str(corpus / "rows"), "--tasks", "arc_easy,piqa", "--against", str(corpus / "gguf"))
    return [
        (
            "eval",
            str(corpus / "onnx"),
            *tasks,
            "--text-tokens",
            "128",
            "--tokenizer",
            str(corpus / "model" / "tokenizer.model"),
            "--report",
            str(out),
        )
    ]


def _artifact(out: Path) -> dict[str, bytes]:
    from elmexport.artifact import Artifact

    problems = Artifact.open(out).verify()
    assert not problems, problems
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def _report(out: Path) -> Any:
    return _without_times(json.loads(out.read_bytes()))


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(one) for key, one in value.items() if "seconds" not in key}
    return [_without_times(one) for one in value] if isinstance(value, list) else value


WORK: Mapping[str, Work] = {
    "export": Work(_exports, _artifact),
    "calibrate": Work(_calibrations, lambda out: out.read_bytes()),
    "eval": Work(_evaluations, _report),
}
SUFFIX = {"export": "", "calibrate": ".safetensors", "eval": ".json"}


def started(command: Sequence[str], cache: Path, log: Path = Path(os.devnull), before: Callable[[], None] = lambda: None) -> int:
    """Run `command` in a fork, after `before`; its process id. What it says goes to `log`; an exception ends it with `RAISED`."""
    pid = os.fork()
    if pid == 0:
        code = RAISED
        try:
            os.environ["ELMEXPORT_CACHE"] = str(cache)
            said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            before()
            code = run(*command)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    return pid


def ended(pid: int, after: float = float("inf")) -> tuple[int, float]:
    """Wait until the process ends, killing it when it has used `after` seconds of processor time; its status (negative: a signal) and its time.

    What processes use that it starts itself is not its own.
    """
    spent = 0.0
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), spent
        spent = max(spent, cpu_seconds(pid))
        if spent >= after:
            os.kill(pid, signal.SIGKILL)
            after = float("inf")
        time.sleep(0.003)


def kills(name: str, corpus: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill the commands of `name` `count` times in all; what was found.

    Raises:
        AssertionError: something looks finished and is not, a run after a kill fails, or its result is another one.
    """
    rng, work = random.Random(seed), WORK[name]
    killed = whole = 0
    difference = 0.0
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        root = Path(folder)
        for number in range(len(work.commands(corpus, root))):
            place, cache = root / f"{number}" / f"out{SUFFIX[name]}", root / f"cache{number}"
            place.parent.mkdir()
            command = work.commands(corpus, place)[number]
            status, seconds = ended(started(command, cache))
            assert status == 0, f"{command} ends with {status}"
            sound = work.result(place)
            wanted = count * (number + 1) // len(work.commands(corpus, root))
            while killed < wanted:
                _remove(place)
                shutil.rmtree(cache, ignore_errors=True)
                status = -signal.SIGKILL
                while status == -signal.SIGKILL:
                    limit = rng.uniform(0, 1.1 * seconds) if killed < wanted else float("inf")
                    status, _ = ended(started(command, cache), limit)
                    killed += status == -signal.SIGKILL
                    if place.exists():  # what looks finished
                        difference = max(difference, compared(sound, work.result(place)))
                        if status != 0:
                            break
                assert status in (0, -signal.SIGKILL), f"{command} after a kill ends with {status}"
                whole += status == 0
                _say(name, killed, whole)
                left = [path.name for path in place.parent.iterdir() if path != place] if status == 0 else []
                assert not left, f"left beside the output: {left}"
    return {"command": name, "kills": killed, "came to their end": whole, "largest difference": difference}


def _say(name: str, killed: int, whole: int) -> None:
    print(f"{name}: {killed} kills, {whole} runs came to their end", file=sys.stderr, flush=True)


SWEEP = """models = ["{model}"]
formats = ["gguf", "onnx"]
quants = ["int8"]
tasks = []
text_tokens = 128
"""


def sweep_kills(corpus: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill sweeps of two cells, or processes of theirs, `count` times in all; what was found.

    Raises:
        AssertionError: a sweep fails that nobody killed, leaves something behind, or gives other bytes or figures than an undisturbed one.
    """
    rng, killed, whole = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        root = Path(folder)
        plan = root / "plan.toml"
        plan.write_text(SWEEP.format(model=corpus / "model"))

        def start(out: Path) -> subprocess.Popen[bytes]:
            environment = os.environ | {"ELMEXPORT_CACHE": str(out.with_name(f"{out.name}-cache"))}
            with out.with_name(f"{out.name}.log").open("ab") as log:
                return subprocess.Popen(sweep_command(plan, out), stdout=log, stderr=log, env=environment)

        before = time.monotonic()
        assert start(root / "sound").wait() == 0, (root / "sound.log").read_text()
        seconds = time.monotonic() - before
        sound = {path.name: contents(path) for path in (root / "sound" / "cells").iterdir()}
        assert len(sound) == 2 and all(sound.values())
        while killed < count:
            out = root / f"killed-{whole}"
            most = min(count, killed + KILLS)  # more in one run a job need not survive
            code: int | None = None
            while code != 0:
                sweep, own = start(out), False
                while (code := sweep.poll()) is None:
                    time.sleep(rng.uniform(0.1, seconds / 3))
                    victim = chosen(sweep, rng) if killed < most else None
                    if victim is not None:
                        with contextlib.suppress(psutil.Error):
                            victim.kill()
                            killed, own = killed + 1, own or victim.pid == sweep.pid
                assert code == 0 or own, f"the sweep ends with {code}: {out.with_name(f'{out.name}.log').read_text()[-1500:]}"
            assert {path.name: contents(path) for path in (out / "cells").iterdir()} == sound, (
                "the result differs from an undisturbed run's"
            )
            assert not list((out / "work").iterdir()), "something is left over"
            whole += 1
            _say("sweep", killed, whole)
            shutil.rmtree(out)
    return {"command": "sweep", "kills": killed, "came to their end": whole, "largest difference": 0.0}


def compared(one: Any, other: Any) -> float:
    """The largest difference of two numbers in the same place; anything else must be equal."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    if isinstance(one, dict) and isinstance(other, dict) and not any(isinstance(value, bytes) for value in one.values()):
        assert one.keys() == other.keys()
        return max((compared(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        return max(map(compared, one, other), default=0.0)
    assert one == other, "the result differs from an undisturbed run's"
    return 0.0


def _remove(place: Path) -> None:
    for path in place.parent.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def prepared(corpus: Path | None) -> Iterator[Path]:
    """The corpus, made where it is None; and everything loaded that commands load, but nothing run."""
    os.environ |= _SETTINGS
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        if corpus is None:
            corpus = Path(temporary) / "corpus"
            build_corpus(corpus)
        import lm_eval.evaluator  # noqa: F401

        import elmexport.cli.main
        import elmexport.exporting  # noqa: F401
        from elmexport.mil.coremltools_import import quiet_coremltools

        with quiet_coremltools():
            import coremltools  # noqa: F401
        for context in (None, 64):  # as forks cannot keep what they traced
            trace(small_config(), context)
        yield corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", action="append", choices=[*WORK, "sweep"], help="may be repeated; all without")
    parser.add_argument("--count", type=int, default=100, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="folder of the corpus of the fuzzing; made without")
    given = parser.parse_args()
    failed = False
    with prepared(given.corpus) as corpus:
        for name in given.command or (*WORK, "sweep"):
            try:
                found = sweep_kills(corpus, given.count, given.seed) if name == "sweep" else kills(name, corpus, given.count, given.seed)
                print(json.dumps(found), flush=True)
            except AssertionError as error:
                print(json.dumps({"command": name, "wrong": str(error)}), flush=True)
                failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
