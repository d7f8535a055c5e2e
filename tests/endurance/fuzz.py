"""Fuzzing of every kind of input through the program's own commands.

    python -m tests.endurance.fuzz --count 10000 --out fuzz.jsonl       every kind; once more, and it goes on where it ended
    python -m tests.endurance.fuzz --kind gguf --seed 4711 --count 1    one input again
    python -m tests.endurance.fuzz --summary --out fuzz.jsonl           what was done so far

An input is its kind and its seed. Commands run in a child process, one after another: what kills it, what takes longer than 10 s of its time,
more than 2 GB of its memory, or ends with another exception than the program's own exit, is a finding, as is a message longer than a screen's
and a file that is left half-written. Exit code 1 where there are findings; they are in `--out` as JSON lines.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from elmexport.runtimes import probing
from tests.endurance.kinds import KINDS, Kind
from tests.endurance.mutations import mutation_for

ROUND = 500  # inputs of a kind that are run, and recorded, together
CPU_LIMIT, WALL_LIMIT = 10.0, 600.0  # seconds of one command; the second for a process that waits for something, on a machine that is busy
MEMORY_LIMIT = 2 << 30  # bytes
LONGEST_MESSAGE, MOST_LINES = 1200, 12
_MEMORY = Path("/dev/shm")  # a disk of which nothing has to wait for the writing
_TICK = os.sysconf("SC_CLK_TCK")


def spoil(kind: Kind, folder: Path, rng: random.Random) -> tuple[Path, bytes]:
    """Spoil one file of `folder`; returns it and its sound content."""
    file = rng.choice(sorted(path for pattern in kind.files for path in folder.glob(pattern) if path.is_file()))
    sound = file.read_bytes()
    spoilt = mutation_for(file, sound)(sound, rng)
    file.write_bytes(spoilt)
    if kind.rehash:
        _rehash(folder, file, spoilt)
    return file, sound


def _rehash(folder: Path, file: Path, content: bytes) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][file.relative_to(folder).as_posix()] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def one_input(name: str, seed: int, corpus: Path, work: Path) -> tuple[int, tuple[str, str] | None]:
    """Give one spoilt input to one command; its exit code, and the finding and what it is about, None where all is well."""
    from tests.endurance.corpus import run

    kind, rng = KINDS[name], random.Random(f"{name} {seed}")
    folder, out = work / "input", work / "out" / "artifact"
    if not folder.exists():
        shutil.copytree(corpus / kind.folder, folder)
    out.parent.mkdir(exist_ok=True)
    manifest = (folder / "manifest.json").read_bytes() if kind.rehash else b""
    commands = kind.commands(corpus, folder, out)
    file, sound = spoil(kind, folder, rng)
    command = rng.choice(commands)
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
    code, finding = 0, None
    try:
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")), contextlib.redirect_stderr(said):
            code = run(*command)
    except BaseException as error:  # what is no Exception among them, as a panic of Rust
        finding = (f"{type(error).__name__} in {_place(error)}", traceback.format_exc(limit=-6))
    finally:
        file.write_bytes(sound)
        if kind.rehash:
            (folder / "manifest.json").write_bytes(manifest)
    said.flush()
    message = said.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    errors = message[message.find("error: ") :]
    left = sorted(str(path.relative_to(work)) for path in (work / "out").iterdir())
    shutil.rmtree(work / "out")
    said_of = " ".join(command)
    if finding is not None:
        return -1, (finding[0], f"{said_of}\n{finding[1]}")
    if code not in (0, 1, 2, 3):
        return code, (f"exit code {code}", said_of)
    if code and not message.strip():
        return code, ("no message", said_of)
    if code and (len(errors) > LONGEST_MESSAGE or errors.count("\n") > MOST_LINES):
        return code, ("a long message", f"{said_of}\n{errors[:2000]}")
    if any("partial" in name or (code and code != 1) for name in left):
        return code, ("half-written output", f"{said_of}: {left}, exit code {code}")
    return code, None


def _place(error: BaseException) -> str:
    """The innermost frame of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if re.search(r"/(elmexport|targets|calibration)/", frame.filename) and "site-packages" not in frame.filename
    ]
    frame = (own or list(frames))[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.name}"


Item = tuple[str, int]  # kind and seed


def child(items: Sequence[Item], corpus: Path, work: Path) -> None:
    """Run the inputs and say so on the original standard output, line by line."""
    tell = os.fdopen(os.dup(1), "w", buffering=1)
    with (work / "noise").open("wb") as noise:  # what foreign code writes
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
    _keep_commands()
    probing._open_apart = _open_in_a_fork
    warm, parent = set[str](), os.getppid()
    for name, seed in items:
        if os.getppid() != parent:  # it was killed
            return
        (work / name).mkdir(exist_ok=True)
        if name not in warm:  # what is loaded once is not the first input's
            warm.add(name)
            one_input(name, -1, corpus, work / name)
        print(json.dumps({"start": seed}), file=tell)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is this input's
        _forked[:] = [0]
        before = time.process_time()
        code, finding = one_input(name, seed, corpus, work / name)
        cpu = time.process_time() - before
        print(json.dumps({"done": seed, "code": code, "memory": _peak(), "cpu": cpu, "finding": finding}), file=tell)
        os.truncate(work / "noise", 0)


def _keep_commands() -> None:
    """Keep the declarations of commands, which are made anew for each run otherwise and cost more than most inputs."""
    import typer

    from elmexport.cli import format_commands
    from elmexport.cli import main as program

    program.app = typer.main.get_command(program.app)  # type: ignore[assignment]
    format_commands._declared = cache(format_commands._declared)


def _open_in_a_fork(kind: str, path: Path, seconds: int) -> int:
    """As the program opens a file apart, in a process that has the engine loaded already.

    mlx has threads that a fork would lack: what ends it ends this process, and is found all the same.
    """
    if kind == "mlx":
        return 0
    pid = os.fork()
    if pid == 0:
        os.environ["GGML_NO_BACKTRACE"] = "1"
        probing.open_here(kind, str(path), str(seconds))
    _, status, usage = os.wait4(pid, 0)
    _forked.append(usage.ru_maxrss << 10)
    return os.waitstatus_to_exitcode(status)


_forked: list[int] = []  # bytes of the forks of the input that is run, each at most


def _peak() -> int:
    """Bytes of this process, or of one that it started, at most since it was last forgotten. The kernel's `ru_maxrss` begins with those of the process that started it."""
    own = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return max(own, *_forked)


def fuzz(kinds: Sequence[str], corpus: Path, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Run `count` inputs of each of `kinds` from seed `first` on: a record for each finding, and one of each kind at its end."""
    items = [(name, seed) for name in kinds for seed in range(first, first + count)]
    done, of_kind = 0, _OfKind()
    while done < len(items):
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None) as work:
            environment = os.environ | {
                "ELMEXPORT_CACHE": f"{work}/cache",
                "OMP_NUM_THREADS": "1",
                "ELMEXPORT_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            arguments = ["--child", str(done), *(f"--kind={name}" for name in kinds), "--corpus", str(corpus), "--work", work]
            command = [sys.executable, "-m", "tests.endurance.fuzz", *arguments, "--seed", str(first), "--count", str(count)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
            try:
                for line in _lines(process):
                    if "start" in line or done == len(items):
                        continue
                    name, seed = items[done]
                    found = of_kind.add(line) or (None if "done" in line else (line["ended"], _tail(Path(work) / "noise")))
                    if found is not None:
                        yield {"kind": name, "seed": seed, "finding": found[0], "about": found[1]}
                    done += 1
                    if done == len(items) or items[done][0] != name:
                        yield {"kind": name, "first": first, **of_kind.record()}
                        of_kind = _OfKind()
                    if line.get("memory", 0) > MEMORY_LIMIT:
                        break
            finally:
                process.kill()
                process.wait()


class _OfKind:
    """What is told of the inputs of one kind."""

    def __init__(self) -> None:
        self.inputs, self.peak, self.cpu, self.codes = 0, 0, 0.0, Counter[int]()

    def add(self, line: dict[str, Any]) -> tuple[str, str] | None:
        """Count an input that came to its end, or did not; its finding."""
        self.inputs += 1
        if "done" not in line:
            return None
        self.codes[line["code"]] += 1
        self.peak = max(self.peak, line["memory"])
        self.cpu += line["cpu"]
        return line["finding"] or (("memory", f"{line['memory'] >> 20} MiB") if line["memory"] > MEMORY_LIMIT else None)

    def record(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "codes": dict(self.codes), "cpu": round(self.cpu, 2), "peak_mib": self.peak >> 20}


def _lines(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What the child says, and how it ended: of itself, or because an input took too long."""
    assert process.stdout is not None
    buffer, since, cpu = b"", None, 0.0
    while True:
        ready, _, _ = select.select([process.stdout], [], [], 0.5)
        if ready:
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                code = process.wait()
                yield {"ended": f"the process ended with {code}"}
                return
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in map(json.loads, lines):
                yield line
                since, cpu = (time.monotonic(), cpu_seconds(process.pid)) if "start" in line else (None, 0.0)
        elif since is not None and (cpu_seconds(process.pid) - cpu > CPU_LIMIT or time.monotonic() - since > WALL_LIMIT):
            process.kill()
            yield {"ended": "hangs"}
            return


def cpu_seconds(pid: int) -> float:
    """Seconds of processor time of a process so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICK


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_bytes()[-1500:].decode("utf-8", "replace")
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="may be repeated; all without")
    parser.add_argument("--count", type=int, default=100, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    parser.add_argument("--corpus", type=Path, help="folder of the sound files; made where it is not there")
    parser.add_argument("--out", type=Path, help="file that findings and figures are added to, as JSON lines")
    parser.add_argument("--summary", action="store_true", help="print what is in --out, and run nothing")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        items = [(name, seed) for name in given.kind for seed in range(given.seed, given.seed + given.count)]
        child(items[given.child :], given.corpus, given.work)
        return
    if given.summary:
        for name, row in summary(_records(given.out)).items():
            print(json.dumps({"kind": name, **row}))
        return
    kinds, stop = given.kind or list(KINDS), given.seed + given.count
    done = {(record["kind"], record["first"]): record["inputs"] for record in _records(given.out) if "inputs" in record}
    found = 0
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        corpus = given.corpus or Path(temporary) / "corpus"
        if not corpus.is_dir():
            build_corpus(corpus)
        for first in range(given.seed, stop, ROUND):
            count = min(ROUND, stop - first)
            for record in fuzz([name for name in kinds if done.get((name, first), 0) < count], corpus, first, count):
                found += "finding" in record
                print(json.dumps({key: value for key, value in record.items() if key != "about"}), flush=True)
                if given.out is not None:
                    with given.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    sys.exit(1 if found else 0)


def _records(path: Path | None) -> list[dict[str, Any]]:
    return [] if path is None or not path.exists() else [json.loads(line) for line in path.read_text().splitlines()]


def summary(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Inputs, exit codes, findings and the largest memory of each kind."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        row = rows.setdefault(
            record["kind"], {"inputs": 0, "peak_mib": 0, "cpu_ms": 0.0, "codes": Counter[str](), "findings": Counter[str]()}
        )
        if "finding" in record:
            row["findings"][record["finding"]] += 1
            continue
        row["cpu_ms"] = round((row["cpu_ms"] * row["inputs"] + 1000 * record["cpu"]) / (row["inputs"] + record["inputs"]), 1)
        row["inputs"] += record["inputs"]
        row["codes"].update(record["codes"])
        row["peak_mib"] = max(row["peak_mib"], record["peak_mib"])
    return rows


def build_corpus(corpus: Path) -> None:
    """Make the corpus in a process of its own, with a cache of its own."""
    with tempfile.TemporaryDirectory(prefix="cache-") as cache:
        code = "import sys; from pathlib import Path; from tests.endurance.corpus import build; build(Path(sys.argv[1]))"
        subprocess.run(
            [sys.executable, "-c", code, str(corpus)], check=True, stdout=subprocess.DEVNULL, env=os.environ | {"ELMEXPORT_CACHE": cache}
        )


if __name__ == "__main__":
    main()
