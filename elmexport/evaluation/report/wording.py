"""Formatting of figures and findings, the same in every form of a report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from elmexport.evaluation.results import KlSummary, PerplexitySummary, Report, Subject, TaskResult

MINUS = "\u2212"


class Finding(StrEnum):
    """Finding of a task about an artifact."""

    WORSE = "worse"
    NOISE = "within noise"
    SAME = "no change"
    BETTER = "better"
    UNKNOWN = "not compared"


@dataclass(frozen=True)
class Reading:
    """Finding with the sentence that explains it."""

    finding: Finding
    words: str


def number(value: float) -> str:
    """Format a number with three significant digits, without an exponent where a person would write none; a true minus sign."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}".replace("-", MINUS)


def points(value: float) -> str:
    """Format percentage points, or a share in per cent, with one decimal."""
    if not math.isfinite(value):
        return number(value)
    return f"{round(value, 1) + 0.0:.1f}".replace("-", MINUS)  # + 0.0: no negative zero


def percent(share: float) -> str:
    """Format a share between 0 and 1 in per cent, without the sign."""
    return points(100 * share)


def nats(value: float) -> str:
    """Format a log-likelihood with two decimals."""
    return f"{value:.2f}".replace("-", MINUS) if math.isfinite(value) else number(value)


def interval(ends: tuple[float, float]) -> str:
    """Format an interval in percentage points."""
    return f"[{points(ends[0])}, {points(ends[1])}]"


def factor(value: float) -> str:
    """Format a ratio, as what it multiplies by."""
    return f"×{value:.3f}" if 0 < value < 2 else f"×{number(value)}"


def published(per_cent: float) -> str:
    """Format a published score, with the digits it was published with."""
    return f"{per_cent:g}"


def p_value(value: float) -> str:
    """Format a p-value with three decimals, never as zero."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def megabytes(count: int) -> str:
    """Format bytes in MB, with one decimal below 100."""
    return f"{count / 1e6:,.{1 if count < 100e6 else 0}f}"


def is_share(task: TaskResult) -> bool:
    """Whether the task's metric is a share of items, which is shown in per cent; the others are perplexities and bits."""
    return "perplexity" not in task.metric and not task.metric.startswith("bits_per")


def score(task: TaskResult, value: float) -> str:
    """Format a value of the task's metric, in per cent where it is a share."""
    return percent(value) if is_share(task) else number(value)


def metric_words(task: TaskResult) -> str:
    """Metric of a task, with its unit."""
    return f"{task.metric}, %" if is_share(task) else task.metric


def reading(task: TaskResult) -> Reading:
    """Interpret a task's comparison: whether its items tell artifact from reference, and how large a drop they could not have seen."""
    compared = task.comparison
    if compared is None:
        return Reading(Finding.UNKNOWN, "no reference")
    if compared.drop is None:
        return _ratio_reading(compared.ratio, compared.ratio_ci)
    drop, ends = compared.drop, compared.drop_ci
    if ends is None:
        return Reading(Finding.UNKNOWN, "no interval: this metric is not a mean over items")
    if ends[0] > 0:
        return Reading(Finding.WORSE, f"worse by {points(drop)} points: the interval excludes 0")
    if ends[1] < 0:
        return Reading(Finding.BETTER, f"better by {points(-drop)} points: the interval excludes 0")
    if compared.detectable_drop is None or drop >= compared.detectable_drop:
        return Reading(Finding.NOISE, "within noise: the interval includes 0")
    same = drop == 0 and compared.flips is not None and compared.flips.right_to_wrong == compared.flips.wrong_to_right == 0
    found = Finding.SAME if same else Finding.NOISE
    return Reading(found, f"{found}: {items(task.n)} cannot show a drop below {points(compared.detectable_drop)} points")


def _ratio_reading(ratio: float | None, ends: tuple[float, float] | None) -> Reading:
    if ratio is None:
        return Reading(Finding.UNKNOWN, "this metric has no drop")
    if ends is not None and ends[0] > 1:
        return Reading(Finding.WORSE, f"worse: {factor(ratio)} the reference's, the interval excludes 1")
    if ends is not None and ends[1] < 1:
        return Reading(Finding.BETTER, f"better: {factor(ratio)} the reference's, the interval excludes 1")
    if ratio == 1:
        return Reading(Finding.SAME, "the same as the reference's")
    return Reading(Finding.NOISE, "within noise: the interval includes 1")


def items(count: int) -> str:
    """Format a number of items, with the noun."""
    return f"{count:,} item" + ("" if count == 1 else "s")


def verdict(report: Report) -> str:
    """Outcome of the gates in one sentence; empty where none was set."""
    if not report.gates:
        return ""
    failed = [gate for gate in report.gates if not gate.passed]
    if not failed:
        return "The gate passed." if len(report.gates) == 1 else f"All {len(report.gates)} gates passed."
    if len(report.gates) == 1:
        return "The gate failed."
    return f"{len(failed)} of {len(report.gates)} gates failed."


def largest_drop(report: Report) -> str:
    """Largest drop of a task, and whether that is noise, in one sentence; empty where nothing was compared."""
    compared = [(task.comparison.drop, name) for name, task in report.tasks.items() if task.comparison and task.comparison.drop is not None]
    if not compared:
        return ""
    drop, name = max(compared)
    if drop <= 0:
        return f"No drop on {name}." if len(compared) == 1 else f"No drop on any of {tasks(len(compared))}."
    judged = {Finding.NOISE: ", within noise", Finding.WORSE: ", beyond noise"}.get(reading(report.tasks[name]).finding, "")
    return f"Largest drop: {points(drop)} points on {name}{judged}."


def facts(artifact: Subject) -> str:
    """Quantization, engine and size of an artifact, without a full stop."""
    known = [artifact.words, f"run by {artifact.engine}"]
    known += [] if artifact.bits_per_weight is None else [f"{artifact.bits_per_weight:.2f} bits per weight"]
    known += [] if artifact.bytes is None else [f"{megabytes(artifact.bytes)} MB"]
    return "; ".join(known)


def against(report: Report) -> str:
    """Reference that an artifact was compared with, a sentence."""
    if report.reference is None:
        return "No reference: scores only, no drops."
    return f"Compared with {report.reference.label}."


def any_published(report: Report) -> bool:
    """Whether a score was published for any task of the report."""
    return any(task.published is not None for task in report.tasks.values())


def tasks(count: int) -> str:
    """Format a number of tasks, with the noun."""
    return f"{count} task" + ("" if count == 1 else "s")


def kl_words(kl: KlSummary) -> str:
    """Divergence and agreement in one sentence."""
    return f"KL divergence {number(kl.mean)} nats per token; {percent(kl.top1_agreement)} % of tokens keep their most likely prediction."


def kl_figures(kl: KlSummary) -> list[tuple[str, str]]:
    """Divergence and agreement, as names and values."""
    low, high = kl.mean_ci
    return [
        ("KL divergence, mean", f"{number(kl.mean)} nats per token [{number(low)}, {number(high)}]"),
        ("KL divergence, 99 %", f"{number(kl.p99)} (median {number(kl.median)}, largest {number(kl.max)})"),
        ("top-1 agreement", f"{percent(kl.top1_agreement)} % of {kl.tokens:,} tokens of {kl.text}"),
    ]


def perplexity_words(perplexity: PerplexitySummary) -> str:
    """A perplexity beside the reference's, or alone with the text it was measured on."""
    value = number(perplexity.value)
    if perplexity.reference is None or perplexity.ratio is None:
        return f"{value}, over {perplexity.tokens:,} tokens of {perplexity.text}"
    ends = f" [{factor(perplexity.ratio_ci[0])}, {factor(perplexity.ratio_ci[1])}]" if perplexity.ratio_ci else ""
    return f"{value}, {factor(perplexity.ratio)}{ends} of the reference's {number(perplexity.reference)}"


def printable(words: str) -> str:
    """Replace control characters, which HTML and SVG cannot hold, by the replacement character."""
    return "".join("\ufffd" if (c < " " and c not in "\n\t") or c == "\x7f" else c for c in words)
