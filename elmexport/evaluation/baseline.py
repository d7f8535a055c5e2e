"""Regression gates against a stored report, paired wherever both met the same items or the same text.

A regression has to be beyond noise and, where pairing makes noise very small (KL divergence, perplexity: the same tokens), also large enough to
matter: a new version of an engine that rounds elsewhere is none. The intervals of the tasks are widened for their number (Bonferroni), so
that a change which makes nothing worse fails at most once in forty times, however many tasks there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.evaluation.comparison import drop_interval, metric_values
from elmexport.evaluation.results import Blocks, Gate, Report, TaskResult
from elmexport.evaluation.statistics import CONFIDENCE, bootstrap_interval, unpaired_interval

NAME = "baseline"
NEGLIGIBLE_KL = 0.02  # of the baseline's mean
NEGLIGIBLE_KL_NATS = 1e-5  # and of what two runs of an unquantized model may differ by
NEGLIGIBLE_PERPLEXITY = 0.001  # of the baseline's

Floats = NDArray[np.float64]


def baseline_gates(report: Report, baseline: Report) -> Iterator[Gate]:
    """One gate for every task of the baseline, and for the KL divergence and perplexity of its text.

    Raises:
        ElmExportError: the baseline is of another model, or has what `report` lacks.
    """
    now, then = report.artifact.model, baseline.artifact.model
    if now.identity is not None and then.identity is not None and now.identity != then.identity:
        raise ElmExportError(
            f"the baseline is of {then.name} ({then.identity[:12]}…), the artifact was made from {now.name} ({now.identity[:12]}…); "
            "make a new baseline for the new weights"
        )
    missing = [name for name in baseline.tasks if name not in report.tasks]
    missing += [name for name in ("kl", "perplexity") if getattr(baseline, name) is not None and getattr(report, name) is None]
    if missing:
        raise ElmExportError(
            f"the baseline has {', '.join(missing)}, this evaluation does not; run it with the same options as the baseline"
        )
    if baseline.kl is not None and _reference(report) != _reference(baseline):
        raise ElmExportError(
            f"the baseline was compared with {_reference(baseline)}, this evaluation with {_reference(report)}; use the same --against"
        )
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(baseline.tasks))
    for name, task in baseline.tasks.items():
        yield _task_gate(name, report.tasks[name], task, confidence)
    yield from _text_gates(report, baseline)


def moved(drop: float) -> str:
    """A drop in points, in words."""
    return f"got {'worse' if drop > 0 else 'better'} by {abs(drop):.2f} points" if drop else "did not change"


def _reference(report: Report) -> str:
    return "nothing" if report.reference is None else f"{report.reference.model.name} ({report.reference.quant})"


def _task_gate(name: str, now: TaskResult, then: TaskResult, confidence: float) -> Gate:
    if now.metric != then.metric or now.fewshot != then.fewshot:
        raise ElmExportError(
            f"{name}: the baseline has {then.metric} with {then.fewshot} few-shot examples, this evaluation {now.metric} with {now.fewshot}; "
            "run it with the same options as the baseline"
        )
    sign = 1.0 if now.higher_is_better else -1.0
    # Perplexities are compared by their logarithms: documents differ by orders of magnitude.
    log = now.metric.endswith("perplexity")
    by_key = {(item.id, item.hash): item for item in then.items}
    common = [item for item in now.items if (item.id, item.hash) in by_key]
    old = [by_key[item.id, item.hash] for item in common] or then.items
    before, after = (_values(metric_values(name, items, now.metric), sign, log) for items in (old, common or now.items))
    if common:
        (low, _), _ = drop_interval(before - after, confidence)
        how = f"{len(common)} items paired"
    else:
        low, _ = _unpaired(before, after, sign, confidence)
        how = f"no items in common with the baseline, so unpaired: {len(after)} against {len(before)}"
    change = float(before.mean() - after.mean())
    passed = not low > 0
    said = f"is {math.exp(change):.4f} of the baseline's" if log else f"{moved(100 * change)} from the baseline"
    verdict = "within noise" if passed else "beyond noise"
    return Gate(NAME, None, change if log else 100 * change, name, passed, f"{name}: {now.metric} {said}, {verdict} ({how})")


def _values(values: Floats, sign: float, log: bool) -> Floats:
    return sign * (np.log(values) if log else values)


def _unpaired(before: Floats, after: Floats, sign: float, confidence: float) -> tuple[float, float]:
    low, high = unpaired_interval(sign * before, sign * after, confidence)  # shares, whose sign may be turned, are between 0 and 1
    return (low, high) if sign > 0 else (-high, -low)


def _text_gates(report: Report, baseline: Report) -> Iterator[Gate]:
    same = report.blocks is not None and baseline.blocks is not None and _text(report.blocks) == _text(baseline.blocks)
    how = "paired, the same text" if same else "another text than the baseline's, so unpaired"
    if report.kl is not None and baseline.kl is not None:
        now, then = report.kl, baseline.kl
        low = _paired_low(report, baseline, "kl") if same else now.mean_ci[0] - then.mean_ci[1]
        said = f"mean KL divergence went from {then.mean:.4g} to {now.mean:.4g} nats per token"
        yield _text_gate("kl", now.mean - then.mean, low, max(NEGLIGIBLE_KL * then.mean, NEGLIGIBLE_KL_NATS), said, how)
    if report.perplexity is not None and baseline.perplexity is not None:
        if same:
            before, after, low = baseline.perplexity.value, report.perplexity.value, _paired_low(report, baseline, "nll")
            said = f"perplexity went from {before:.4f} to {after:.4f}"
        else:  # perplexities of different texts say nothing about each other; their ratios to the reference do
            (before, _, highest), (after, lowest, _) = _ratio(baseline), _ratio(report)
            low = math.log(lowest / highest)
            said = f"perplexity went from {before:.4f} to {after:.4f} times the reference's"
        yield _text_gate("perplexity", math.log(after / before), low, NEGLIGIBLE_PERPLEXITY, said, how)


def _text(blocks: Blocks) -> tuple[str, tuple[int, ...]]:
    return blocks.text_hash, blocks.tokens


def _paired_low(report: Report, baseline: Report, figure: str) -> float:
    """Lower end of the interval of the rise of `figure`, "kl" or "nll", per token."""
    now, then = np.array(getattr(report.blocks, figure)), np.array(getattr(baseline.blocks, figure))
    assert report.blocks is not None
    return bootstrap_interval(now - then, np.array(report.blocks.tokens, dtype=np.float64))[0]


def _ratio(report: Report) -> tuple[float, float, float]:
    perplexity = report.perplexity
    if perplexity is None or perplexity.ratio is None or perplexity.ratio_ci is None:
        raise ElmExportError(
            "the baseline's perplexity is of another text, and one of the two has no reference to relate it to; use the baseline's --text"
        )
    return perplexity.ratio, *perplexity.ratio_ci


def _text_gate(figure: str, change: float, low: float, least: float, said: str, how: str) -> Gate:
    passed = not (low > 0 and change > least)
    verdict = "beyond noise" if not passed else "too little to matter" if low > 0 else "within noise"
    return Gate(f"{NAME}-{figure}", None, change, None, passed, f"{said}, {verdict} ({how})")
