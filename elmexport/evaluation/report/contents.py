"""Contents of a report: everything that its forms (HTML, Markdown, terminal) say, built once from the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elmexport.evaluation.report.method import how_measured, made_by, notes
from elmexport.evaluation.report.overview import common_tasks, differences, labels, mean_drop
from elmexport.evaluation.report.scores import drop_table, score_table
from elmexport.evaluation.report.table import Cell, Column, Kind, Table, Tone, number_column
from elmexport.evaluation.report.wording import (
    against,
    factor,
    facts,
    kl_figures,
    kl_words,
    largest_drop,
    megabytes,
    number,
    percent,
    perplexity_words,
    points,
    tasks,
    verdict,
)
from elmexport.evaluation.results import Report


@dataclass(frozen=True)
class Contents:
    """Contents of one report, or of a comparison of several. Tables are None, and texts empty, where nothing was measured.

    Args:
        verdict: the gates in one sentence; None where none was set.
        findings: sentences for a reader who stops after them.
        facts: what was evaluated, and what it was compared with.
        tasks: the scores of one report; of several, their drops.
        scores: the scores of each of several reports.
        differences: what makes several reports hard to compare, sentences.
        notes: what was unusual about the evaluation, without full stops.
        method: how it was measured, sentences.
    """

    title: str
    verdict: Cell | None
    findings: tuple[str, ...]
    facts: str
    artifacts: Table | None
    tasks: Table | None
    scores: tuple[Table, ...]
    text: Table | None
    gates: Table | None
    differences: tuple[str, ...]
    notes: tuple[str, ...]
    method: tuple[str, ...]
    made_by: str


def contents_of(reports: Sequence[Report]) -> Contents:
    """Contents of one report, or of a comparison of several."""
    return _one(reports[0]) if len(reports) == 1 else _several(reports)


def _one(report: Report) -> Contents:
    outcome = verdict(report)
    return Contents(
        title=report.artifact.label,
        verdict=Cell(outcome, tone=_tone(report.passed)) if outcome else None,
        findings=tuple(filter(None, (largest_drop(report), "" if report.kl is None else kl_words(report.kl)))),
        facts=f"{facts(report.artifact)}. {against(report)}",
        artifacts=None,
        tasks=score_table(report, "Scores by task"),
        scores=(),
        text=_text_table(report),
        gates=_gate_table([report]),
        differences=(),
        notes=notes([report]),
        method=how_measured([report]),
        made_by=made_by([report]),
    )


def _several(reports: Sequence[Report]) -> Contents:
    names = labels(reports)
    failed = [name for name, report in zip(names, reports, strict=True) if not report.passed]
    outcome = f"Gates failed: {', '.join(failed)}." if failed else "All gates passed."
    models = ", ".join(sorted({report.artifact.model.name for report in reports}))
    scores = [score_table(report, f"{i}. {name}: scores by task") for i, (name, report) in enumerate(zip(names, reports, strict=True), 1)]
    return Contents(
        title=f"{len(reports)} artifacts compared",
        verdict=Cell(outcome, tone=_tone(not failed)) if any(report.gates for report in reports) else None,
        findings=(),
        facts=f"What quantization cost, of {models}.",
        artifacts=_artifact_table(reports),
        tasks=drop_table(reports),
        scores=tuple(table for table in scores if table is not None),
        text=None,
        gates=_gate_table(reports),
        differences=tuple(differences(reports)),
        notes=notes(reports),
        method=how_measured(reports),
        made_by=made_by(reports),
    )


def _tone(passed: bool) -> Tone:
    return Tone.GOOD if passed else Tone.BAD


def _artifact_table(reports: Sequence[Report]) -> Table:
    """The artifacts of a comparison, with size and what quantization cost each as a whole."""
    common = common_tasks(reports)
    columns = (
        Column("artifact"),
        Column("quantization, engine", Kind.QUALIFIER),
        number_column("MB"),
        number_column("bits per weight", "bits"),
        number_column("KL mean"),
        number_column("KL 99 %"),
        number_column("top-1, %", "top-1"),
        number_column("perplexity", "perpl."),
        number_column("mean drop", "drop"),
    )
    rows = []
    for i, (name, report) in enumerate(zip(labels(reports), reports, strict=True), 1):
        artifact, kl, perplexity = report.artifact, report.kl, report.perplexity
        row = (
            Cell(f"{i}. {name}", i),
            Cell(f"{artifact.quant}, {artifact.engine}"),
            _optional(artifact.bytes, megabytes),
            _optional(artifact.bits_per_weight, "{:.2f}".format),
            _optional(None if kl is None else kl.mean, number),
            _optional(None if kl is None else kl.p99, number),
            _optional(None if kl is None else kl.top1_agreement, percent),
            _optional(None if perplexity is None else perplexity.ratio, factor),
            _optional(mean_drop(report, common), points),
        )
        rows.append(row)
    notes = [
        "KL divergence in nats per token; top-1: tokens whose most likely prediction is the reference's; perplexity: times the reference's."
    ]
    notes += [f"Mean drop: points, over {tasks(len(common))} that every artifact ran."] if common else []
    return Table("Size, and what quantization cost", columns, tuple(rows), tuple(notes), sortable=True)


def _optional(value: float | None, show: Callable[..., str]) -> Cell:
    return Cell() if value is None else Cell(show(value), value)


def _gate_table(reports: Sequence[Report]) -> Table | None:
    """Every gate with its outcome and reason, of several reports with the artifact; None where none was set."""
    several = len(reports) > 1
    rows = [
        (
            *([Cell(name)] if several else []),
            Cell("passed" if gate.passed else "failed", tone=_tone(gate.passed)),
            Cell(gate.name),
            Cell(gate.reason),
        )
        for name, report in zip(labels(reports), reports, strict=True)
        for gate in report.gates
    ]
    columns = (*([Column("artifact")] if several else []), Column("outcome"), Column("gate"), Column("reason"))
    return Table("Limits that the artifact must keep", columns, tuple(rows)) if rows else None


def _text_table(report: Report) -> Table | None:
    """Findings of the text pass; None where there was none."""
    found = [] if report.kl is None else kl_figures(report.kl)
    found += [] if report.perplexity is None else [("perplexity", perplexity_words(report.perplexity))]
    rows = tuple((Cell(name), Cell(value)) for name, value in found)
    return Table("Divergence and perplexity on a text", (Column("text"), Column("")), rows) if rows else None
