"""Benchmark in rounds: each opens every artifact once, in a process of its own, so that disturbances of the machine meet all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from elmexport.artifact import MANIFEST, Artifact
from elmexport.bench.guesses import Guesses
from elmexport.bench.results import ArtifactResult, Benchmark, DecodeResult, Machine, OwnLookup, PrefillResult, SpeculationResult, Summary
from elmexport.bench.traffic import Traffic, traffic
from elmexport.bench.workload import Workload
from elmexport.cores import VARIABLE, available_cores
from elmexport.errors import ElmExportError, MissingDependencyError, VerificationError
from elmexport.progress import Progress, SilentProgress
from elmexport.runtimes import CHECKPOINT, artifact_kind
from elmexport.runtimes.probing import probe

REPEAT = 3
_BANDWIDTH_BYTES = 1 << 30  # more than any cache holds
EXECUTOR_NOTE = "run by elmexport's own executor, a numerical reference: nothing here is the speed of an Apple device"
_PACKAGES = ("elmexport", "onnxruntime", "llama_cpp_python", "torch", "numpy")
_ERRORS = {kind.exit_code: kind for kind in (ElmExportError, VerificationError, MissingDependencyError)}


@dataclass(frozen=True)
class _Subject:
    path: Path
    kind: str
    quant: str | None
    file_bytes: int
    traffic: Traffic | None


def benchmark(
    paths: Sequence[Path],
    workload: Workload,
    *,
    repeat: int = REPEAT,
    threads: int | None = None,
    fit: Collection[str] = (),
    guesses: Guesses | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure `workload` on every artifact of `paths` (folders, or bare model files), `repeat` times.

    `threads` that the engines use: all cores that this process may use where None. An artifact whose context is too short for the
    workload has those parts of it that `fit` names (see `PARTS`) cut to what fits. `guesses`: measure speculative decoding, too.

    Raises:
        ElmExportError: a count that makes no sense, nothing that a runtime opens, or a workload beyond a context; the first two, and for
            artifact folders the third, before any work.
        MissingDependencyError: an engine is not installed, or the system is Windows.
    """
    if sys.platform == "win32":
        raise MissingDependencyError(
            "elmexport bench asks the system for memory in ways that Windows does not have; run it on Linux or macOS"
        )
    workload.check()
    if guesses is not None:
        guesses.check(paths)
    if repeat < 1:
        raise ElmExportError(f"--repeat is {repeat}; it must be 1 or more")
    if threads is not None and threads < 1:
        raise ElmExportError(f"--threads is {threads}; it must be 1 or more")
    threads = threads or available_cores()
    subjects = [_subject(path, workload, fit) for path in paths]
    progress = progress or SilentProgress()
    for subject in subjects:
        if subject.kind != CHECKPOINT:
            probe(subject.kind, subject.path)
    progress.stage("measuring", repeat * (len(subjects) + 1))
    bandwidths: list[float] = []
    runs: list[list[dict[str, Any]]] = [[] for _ in subjects]
    for _ in range(repeat):
        for subject, done in zip(subjects, runs, strict=True):
            done.append(_measure(subject.path, workload, fit, threads, guesses))
            progress.advance(1)
        bandwidths.append(float(_python("elmexport.bench.bandwidth", str(threads), str(_BANDWIDTH_BYTES), threads=threads)))
        progress.advance(1)
    return Benchmark(_machine(), threads, repeat, Summary.of(bandwidths), summarize(subjects, runs, Summary.of(bandwidths).median, guesses))


def summarize(
    subjects: Sequence[_Subject], runs: Sequence[Sequence[dict[str, Any]]], bandwidth: float, guesses: Guesses | None = None
) -> tuple[ArtifactResult, ...]:
    """Figures of each subject from its `runs`, answers of the worker; ratios are to the first subject."""
    first: ArtifactResult | None = None
    results: list[ArtifactResult] = []
    for subject, answers in zip(subjects, runs, strict=True):
        result = _summarize(subject, answers, bandwidth, first, guesses)
        first = first or result
        results.append(result)
    return tuple(results)


def _summarize(
    subject: _Subject, answers: Sequence[dict[str, Any]], bandwidth: float, first: ArtifactResult | None, guesses: Guesses | None
) -> ArtifactResult:
    facts, generate = answers[0], answers[0]["generate"]
    of_first = {} if first is None else {(0, row.tokens): row.tokens_per_s.median for row in first.prefill}
    of_first |= {} if first is None else {(1, row.depth): row.tokens_per_s.median for row in first.decode if row.tokens == generate}

    def ratio(key: tuple[int, int], rate: Summary) -> float | None:
        if first is None:
            return 1.0
        return rate.median / of_first[key] if key in of_first else None

    prefill = []
    for tokens in map(int, facts["prefill_s"]):
        rate = Summary.of([tokens / answer["prefill_s"][str(tokens)] for answer in answers])
        prefill.append(PrefillResult(tokens, rate, ratio((0, tokens), rate)))
    decode = []
    for depth in map(int, facts["decode_s"]):
        rate = Summary.of([generate / answer["decode_s"][str(depth)] for answer in answers])
        read = None if subject.traffic is None else subject.traffic.per_token(depth, generate)
        part = None if read is None else rate.median * read / bandwidth
        decode.append(DecodeResult(depth, generate, rate, ratio((1, depth), rate), read, part))
    return ArtifactResult(
        path=str(subject.path),
        name=subject.path.resolve().name,
        target=subject.kind,
        engine=facts["engine"],
        quant=subject.quant,
        context=facts["context"],
        file_bytes=subject.file_bytes,
        load_s=Summary.of([answer["load_s"] for answer in answers]),
        before_bytes=facts["before_bytes"],
        peak_bytes=Summary.of([answer["peak_bytes"] for answer in answers]),
        prefill=tuple(prefill),
        decode=tuple(decode),
        speculation=None if guesses is None else _speculation(guesses, [answer["speculation"] for answer in answers]),
        note=EXECUTOR_NOTE if facts["engine"] == "mil executor" else None,
    )


def _speculation(guesses: Guesses, answers: Sequence[dict[str, Any]]) -> SpeculationResult:
    rate, plain = (Summary.of([answer["tokens"] / answer[key] for answer in answers]) for key in ("guessed_s", "plain_s"))
    last = answers[-1]
    counted = {key: last[key] for key in ("tokens", "accepted", "drafted", "mean_accepted", "note")}
    own = None
    if last["own"] is not None:
        theirs, base = (Summary.of([1 / answer["own"][key] for answer in answers]) for key in ("guessed_s", "plain_s"))
        own = OwnLookup(f"llama.cpp's own {guesses.words}", theirs, base, theirs.median / base.median)
    speed_up = rate.median / plain.median
    return SpeculationResult(how=guesses.words, tokens_per_s=rate, plain_tokens_per_s=plain, speed_up=speed_up, own=own, **counted)


def _subject(path: Path, workload: Workload, fit: Collection[str]) -> _Subject:
    kind, quant = artifact_kind(path), None
    if (path / MANIFEST).is_file():
        manifest = Artifact.open(path).manifest
        quant = manifest.quant.name
        workload.fitted(manifest.context, fit).check_context(path.name, manifest.context)
    return _Subject(path, kind, quant, _size(path), traffic(path))


def _size(path: Path) -> int:
    """Bytes of a folder's files; of a bare model file with its external data, or a package."""
    files = path.rglob("*") if path.is_dir() else (path, path.with_name(f"{path.name}_data"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _measure(path: Path, workload: Workload, fit: Collection[str], threads: int, guesses: Guesses | None) -> dict[str, Any]:
    job = {"path": str(path), "prompts": workload.prompts, "depths": workload.depths, "generate": workload.generate, "fit": list(fit)}
    job["guesses"] = None if guesses is None else asdict(guesses)
    answer: dict[str, Any] = json.loads(_python("elmexport.bench.worker", threads=threads, stdin=json.dumps(job)))
    if "error" in answer:
        raise _ERRORS[answer["exit_code"]](answer["error"])
    return answer


def _python(module: str, *arguments: str, threads: int, stdin: str = "") -> str:
    """The last line that `module` prints, run in a process of its own with so many threads for every engine.

    Raises:
        ElmExportError: it did not get to the end.
    """
    count = str(threads)
    environment = {**os.environ, VARIABLE: count, "OMP_NUM_THREADS": count}  # the latter is torch's, which runs Core ML packages here
    done = subprocess.run([sys.executable, "-m", module, *arguments], input=stdin, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ElmExportError(
            f"a measuring process ended with {done.returncode} (it said: {said}); negative codes are signals, -9 most often means that memory ran out"
        )
    return done.stdout.strip().splitlines()[-1]


def _machine() -> Machine:
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return Machine(f"{platform.system()} {platform.machine()}", os.cpu_count(), platform.python_version(), packages)
