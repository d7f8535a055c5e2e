"""Results of a sweep: what its finished cells measured, read from the folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from elmexport.bench.results import SCHEMA as BENCHMARK_SCHEMA
from elmexport.bench.results import ArtifactResult, Benchmark
from elmexport.documents import parse_json, to_struct
from elmexport.errors import ElmExportError
from elmexport.evaluation.results import KlSummary, PerplexitySummary, Report, read_report
from elmexport.sweep.folder import is_done, read_jobs, read_marker, read_result
from elmexport.sweep.jobs import CellFacts, Kind, Outcome


@dataclass(frozen=True)
class Text:
    """Findings of one text; `kl` is None where it was read without a reference."""

    kl: KlSummary | None
    perplexity: PerplexitySummary


@dataclass(frozen=True)
class CellResult:
    """A finished cell.

    Args:
        folder: of the cell; `facts.artifact` lies in it.
        report: the tasks of all its evaluations, and the first text; None where nothing was evaluated.
        texts: all texts, by name.
    """

    key: str
    folder: Path
    facts: CellFacts
    outcome: Outcome
    report: Report | None
    texts: Mapping[str, Text]
    bench: ArtifactResult | None

    @property
    def recipe(self) -> str:
        """Recipe in a few words: format, quantization, and the method where it is not the default one."""
        facts = self.facts
        return f"{facts.format} {facts.quant}" + ("" if facts.method == "mse" else f" {facts.method}")

    @property
    def label(self) -> str:
        return f"{self.facts.model} {self.recipe}"


@dataclass(frozen=True)
class SweepResults:
    """The cells of the plan that was run last: those that are finished, in the plan's order, and the labels of the others."""

    folder: Path
    cells: tuple[CellResult, ...]
    missing: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.facts.model for cell in self.cells))

    @property
    def reports(self) -> list[Report]:
        return [cell.report for cell in self.cells if cell.report is not None]


def read_sweep(folder: Path) -> SweepResults:
    """Read the results in the folder of a sweep.

    Raises:
        ElmExportError: no sweep, none of its cells finished, or damaged files.
    """
    read_marker(folder)
    jobs = [job for job in read_jobs(folder) if job.kind is Kind.CELL]
    done = [job for job in jobs if is_done(folder, job.kind, job.key)]
    if not done:
        raise ElmExportError(f"{folder}: none of the {len(jobs)} cells is finished; run elmexport sweep first")
    missing = tuple(job.label for job in jobs if job not in done)
    return SweepResults(folder, tuple(_cell(folder, job.key) for job in done), missing)


def _cell(out: Path, key: str) -> CellResult:
    folder = out / Kind.CELL / key
    result = read_result(folder)
    facts = result.facts
    if facts is None:
        raise ElmExportError(f"{folder} does not say which cell it is; remove it and run the sweep again")
    reports = [read_report(folder / name) for name in facts.evaluations]
    texts = {}
    for report in reports:
        if report.perplexity is not None:
            texts[report.perplexity.text.partition(",")[0]] = Text(report.kl, report.perplexity)
    merged = None
    if reports:
        tasks = {name: task for report in reports for name, task in report.tasks.items()}
        merged = msgspec.structs.replace(reports[0], tasks=tasks, seconds=sum(report.seconds for report in reports))
    bench = None if facts.benchmark is None else _benchmark(folder / facts.benchmark)
    return CellResult(key, folder, facts, result.outcome, merged, texts, bench)


def _benchmark(path: Path) -> ArtifactResult:
    fix = "remove that cell's folder and run the sweep again"
    try:
        document = parse_json(path.read_bytes(), str(path), fix)
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}; {fix}") from None
    if isinstance(document, dict) and isinstance(document.get("schema"), int) and document["schema"] > BENCHMARK_SCHEMA:
        raise ElmExportError(
            f"{path}: benchmark schema {document['schema']}, this version reads up to {BENCHMARK_SCHEMA}; update elmexport"
        )
    found = to_struct(document, Benchmark, str(path), fix)
    return found.artifacts[0]
