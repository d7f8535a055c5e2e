"""Method section of a report: sentences on how its figures were measured."""

from __future__ import annotations

from collections.abc import Sequence

from elmexport.evaluation.report.wording import any_published
from elmexport.evaluation.results import Report


def how_measured(reports: Sequence[Report]) -> tuple[str, ...]:
    """Sentences on the method: metrics, pairing, intervals, reference, how many items."""
    compared = [task.comparison for report in reports for task in report.tasks.values() if task.comparison]
    intervals = [comparison for comparison in compared if comparison.drop_ci is not None]
    sentences = []
    if any(report.tasks for report in reports):
        sentences.append("Scores are lm-eval's own metrics, in per cent.")
    if compared:
        sentences.append(
            "Artifact and reference answer the same items and are compared item by item: "
            "lost counts answers that turned from right to wrong, won those that turned right."
        )
    if intervals:
        sentences.append(
            f"Intervals hold the true drop 95 times in 100 ({'; '.join(sorted({comparison.ci_method for comparison in intervals}))}). "
            "A drop is within noise where its interval includes 0; the reading says how large a true drop so many items find four times in five."
        )
    if len(intervals) >= 10:
        sentences.append(
            f"Of the {len(intervals)} intervals of this report, about {round(len(intervals) / 20)} would exclude 0 by chance alone."
        )
    if any(map(any_published, reports)):
        sentences.append("Published: the authors' own figure for this model and number of shots, on all items of the task.")
    references = {report.reference.label: report.reference.words for report in reports if report.reference}
    sentences += [f"Reference: {label}, {words}." for label, words in references.items()]
    limits = {report.settings.get("limit") for report in reports if report.tasks}
    if len(limits) == 1:
        (limit,) = limits
        sentences.append(
            "All items of each task." if limit is None else f"At most {limit} items of each task, drawn alike for every artifact."
        )
    return tuple(sentences)


def notes(reports: Sequence[Report]) -> tuple[str, ...]:
    """Remarkable facts about the evaluation, each note once, without full stops."""
    return tuple(dict.fromkeys(note for report in reports for note in report.settings.get("notes", ())))


def made_by(reports: Sequence[Report]) -> str:
    """Versions of the programs, and how long the evaluation took."""
    versions = sorted({report.elmexport for report in reports})
    lm_eval = sorted({report.lm_eval for report in reports if report.lm_eval})
    seconds = sum(report.seconds for report in reports)
    took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return f"elmexport {', '.join(versions)}" + (f", lm-eval {', '.join(lm_eval)}" if lm_eval else "") + f"; evaluation took {took}"
