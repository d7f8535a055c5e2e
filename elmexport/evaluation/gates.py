"""Quality gates: limits on the loss of a quantization, and regressions against a stored report.

A limit is held against the measured figure itself, not against the edge of its interval: the same artifact on the same items always
gives the same verdict, and few items cannot make a gate lenient. Whether noise could explain a failure, or hide a drop in a pass, is said
in the reason. A baseline is the other way about: nobody chose a limit there, so a regression is what noise does not explain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from elmexport.errors import ElmExportError
from elmexport.evaluation.baseline import baseline_gates, moved
from elmexport.evaluation.results import Gate, Report, TaskResult


class GateFailure(ElmExportError):
    """An artifact that does not meet the limits it was held against."""

    exit_code = 1


@dataclass(frozen=True)
class Limits:
    """Limits on the loss of an artifact; None: no limit."""

    max_drop: float | None = None  # percentage points, each task
    max_kl: float | None = None  # mean, nats per token
    max_ppl_ratio: float | None = None  # of the text and of each perplexity task, artifact / reference

    def check(self) -> None:
        """Refuse limits that cannot be held.

        Raises:
            ElmExportError: a limit that is no number, or one that nothing could meet.
        """
        for option, value, least in (
            ("--max-drop", self.max_drop, None),
            ("--max-kl", self.max_kl, 0),
            ("--max-ppl-ratio", self.max_ppl_ratio, 0),
        ):
            if value is not None and (not np.isfinite(value) or (least is not None and value < least)):
                raise ElmExportError(f"{option} is {value:g}; give a finite number" + ("" if least is None else f" from {least} up"))


def check_gates(report: Report, limits: Limits, baseline: Report | None = None) -> Report:
    """Check the gates of `report`: the verdicts of `limits` and of the stored report `baseline`.

    Raises:
        ElmExportError: a limit on something that was not measured, or a baseline of another model or with tasks that were not run.
    """
    limits.check()
    gates = [*_drop_gates(report, limits.max_drop), *_kl_gate(report, limits.max_kl), *_ratio_gates(report, limits.max_ppl_ratio)]
    if baseline is not None:
        gates += baseline_gates(report, baseline)
    return replace(report, gates=tuple(gates))


def enforce(report: Report) -> None:
    """Raise an error where a gate has failed.

    Raises:
        GateFailure: a gate of `report` has failed; the message is one line.
    """
    failed = [gate for gate in report.gates if not gate.passed]
    if failed:
        raise GateFailure(
            f"{len(failed)} of {len(report.gates)} gates failed for {report.artifact.label}: {'; '.join(gate.reason for gate in failed)}"
        )


def _drop_gates(report: Report, limit: float | None) -> Iterator[Gate]:
    if limit is None:
        return
    drops = {name: task for name, task in report.tasks.items() if task.comparison is not None and task.comparison.drop is not None}
    if not drops:
        raise ElmExportError("--max-drop needs a task with a reference to compare with; give --tasks, and leave the comparison on")
    for name, task in drops.items():
        drop = _drop(task)
        passed = drop <= limit
        yield Gate("max-drop", limit, drop, name, passed, _drop_reason(name, task, drop, limit, passed))


def _drop(task: TaskResult) -> float:
    assert task.comparison is not None and task.comparison.drop is not None
    return task.comparison.drop


def _drop_reason(name: str, task: TaskResult, drop: float, limit: float, passed: bool) -> str:
    assert task.comparison is not None
    reason = f"{name}: {task.metric} {moved(drop)}, {limit:g} allowed"
    interval, detectable = task.comparison.drop_ci, task.comparison.detectable_drop
    if interval is None:
        return reason
    reason += f" ({task.n} items, 95 % interval {interval[0]:.2f} to {interval[1]:.2f}"
    if not passed:
        verdict = "noise could explain it: evaluate more items" if interval[0] <= limit else "beyond noise"
        return f"{reason}; {verdict})"
    if detectable is not None and detectable > limit:
        reason += f"; a drop under {detectable:.1f} points may go unseen"
    return f"{reason})"


def _kl_gate(report: Report, limit: float | None) -> Iterator[Gate]:
    if limit is None:
        return
    if report.kl is None:
        raise ElmExportError("--max-kl needs the text pass and a reference to compare with; leave both on")
    kl = report.kl
    low, high = kl.mean_ci
    reason = f"mean KL divergence {kl.mean:.4g} nats per token, {limit:g} allowed ({kl.tokens} tokens of {kl.text}, 95 % interval {low:.4g} to {high:.4g})"
    yield Gate("max-kl", limit, kl.mean, None, kl.mean <= limit, reason)


def _ratio_gates(report: Report, limit: float | None) -> Iterator[Gate]:
    if limit is None:
        return
    found = False
    perplexity = report.perplexity
    if perplexity is not None and perplexity.ratio is not None and perplexity.ratio_ci is not None:
        found = True
        yield _ratio_gate(None, perplexity.ratio, perplexity.ratio_ci, limit, f"{perplexity.tokens} tokens of {perplexity.text}")
    for name, task in report.tasks.items():
        comparison = task.comparison
        if comparison is not None and comparison.ratio is not None and comparison.ratio_ci is not None:
            found = True
            yield _ratio_gate(name, comparison.ratio, comparison.ratio_ci, limit, f"{task.n} documents")
    if not found:
        raise ElmExportError("--max-ppl-ratio needs the text pass or a perplexity task, and a reference to compare with")


def _ratio_gate(task: str | None, ratio: float, interval: tuple[float, float], limit: float, what: str) -> Gate:
    reason = (
        f"{'' if task is None else f'{task}: '}perplexity is {ratio:.4f} of the reference's, {limit:g} allowed "
        f"({what}, 95 % interval {interval[0]:.4f} to {interval[1]:.4f})"
    )
    return Gate("max-ppl-ratio", limit, ratio, task, ratio <= limit, reason)
