"""Reports as GitHub-flavoured Markdown, short enough for a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from elmexport.evaluation.report.overview import common_tasks, differences, drop, labels, mean_drop, task_names
from elmexport.evaluation.report.wording import (
    Finding,
    against,
    any_published,
    factor,
    facts,
    interval,
    largest_drop,
    megabytes,
    metric_words,
    number,
    p_value,
    percent,
    points,
    published,
    reading,
    score,
    text_figures,
    verdict,
)
from elmexport.evaluation.results import Report, TaskResult


def markdown(reports: Sequence[Report]) -> str:
    """One report, or a comparison of several; ends with a newline."""
    parts = _one(reports[0]) if len(reports) == 1 else _several(reports)
    return "\n\n".join(parts) + "\n"


def _one(report: Report) -> list[str]:
    parts = [
        _escaped(f"### {_mark(report)}{report.artifact.label}"),
        _escaped(" ".join(filter(None, (verdict(report), largest_drop(report), _kl(report))))),
        _escaped(f"{facts(report.artifact)}. {against(report)}"),
    ]
    if report.tasks:
        parts.append(_task_table(report))
    if figures := text_figures(report):
        parts.append(_table(("text", ""), figures))
    if report.gates:
        parts.append(_gate_table([("", report)]))
    parts += [_escaped(f"Note: {note}.") for note in report.settings.get("notes", ())]
    return list(filter(None, parts))


def _kl(report: Report) -> str:
    return "" if report.kl is None else f"Mean KL divergence: {number(report.kl.mean)} nats per token."


def _mark(report: Report) -> str:
    return "" if not report.gates else "✅ " if report.passed else "❌ "


def _task_table(report: Report) -> str:
    paper = any_published(report)
    compared = (">reference", ">artifact", ">drop, points", ">95 % interval", ">lost, won", ">McNemar p", "reading")
    columns = ("task", "metric", ">shots", ">n", *(compared if report.reference else (">artifact",)), *((">published",) if paper else ()))
    rows: list[tuple[str, ...]] = []
    for name, task in report.tasks.items():
        found = _compared(task) if report.reference else (score(task, task.metrics[task.metric]),)
        rows.append((name, metric_words(task), str(task.fewshot), f"{task.n:,}", *found, *((_published(task),) if paper else ())))
    return _table(columns, rows)


def _compared(task: TaskResult) -> tuple[str, ...]:
    own, found, compared = score(task, task.metrics[task.metric]), reading(task), task.comparison
    if compared is None:
        return "", own, "", "", "", "", found.words
    change = points(compared.drop) if compared.drop is not None else factor(compared.ratio) if compared.ratio is not None else ""
    ends = "" if compared.drop_ci is None else interval(compared.drop_ci)
    flips = "" if compared.flips is None else f"{compared.flips.right_to_wrong}, {compared.flips.wrong_to_right}"
    p = "" if compared.mcnemar_p is None else p_value(compared.mcnemar_p)
    return score(task, compared.reference[task.metric]), own, change, ends, flips, p, found.words


def _published(task: TaskResult) -> str:
    return "" if task.published is None else published(task.published)


def _several(reports: Sequence[Report]) -> list[str]:
    names, common = labels(reports), common_tasks(reports)
    failed = [name for name, report in zip(names, reports, strict=True) if not report.passed]
    gated = any(report.gates for report in reports)
    judged = "" if not gated else f"❌ Gates failed: {', '.join(failed)}." if failed else "✅ All gates passed."
    parts = [f"### {len(reports)} artifacts compared", _escaped(judged), _artifact_table(reports, names, common)]
    if common:
        parts.append(f"Drop: percentage points, mean over {', '.join(map(_escaped, common))}. KL divergence: nats per token.")
    if task_names(reports):
        rows = [(name, *(_drop_cell(report, name) for report in reports)) for name in task_names(reports)]
        parts.append(_table(("drop", *(f">{i}" for i in range(1, len(reports) + 1))), rows))
        parts.append("\\* beyond noise: the 95 % interval excludes 0.")
    parts += [f"Note: {_escaped(note)}" for note in differences(reports)]
    if gated:
        parts.append(_gate_table(list(zip(names, reports, strict=True))))
    return list(filter(None, parts))


def _artifact_table(reports: Sequence[Report], names: Sequence[str], common: Sequence[str]) -> str:
    rows = []
    for i, (name, report) in enumerate(zip(names, reports, strict=True), 1):
        artifact, kl, perplexity, mean = report.artifact, report.kl, report.perplexity, mean_drop(report, common)
        text = ("", "", "") if kl is None else (number(kl.mean), number(kl.p99), f"{percent(kl.top1_agreement)} %")
        ratio = "" if perplexity is None or perplexity.ratio is None else factor(perplexity.ratio)
        size = "" if artifact.bytes is None else megabytes(artifact.bytes)
        bits = "" if artifact.bits_per_weight is None else f"{artifact.bits_per_weight:.2f}"
        rows.append((str(i), name, size, bits, *text, ratio, "" if mean is None else points(mean)))
    columns = (">", "artifact", ">MB", ">bits per weight", ">KL mean", ">KL 99 %", ">top-1 agreement", ">perplexity", ">drop")
    return _table(columns, rows)


def _drop_cell(report: Report, task: str) -> str:
    value = drop(report, task)
    if value is None:
        return ""
    return points(value) + ("*" if reading(report.tasks[task]).finding in (Finding.WORSE, Finding.BETTER) else "")


def _gate_table(reports: Sequence[tuple[str, Report]]) -> str:
    named = len(reports) > 1
    rows = [
        (*((name,) if named else ()), "passed" if gate.passed else "❌ failed", gate.name, gate.reason)
        for name, report in reports
        for gate in report.gates
    ]
    return _table((*(("artifact",) if named else ()), "", "gate", "reason"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a column whose name starts with `>` is aligned to the right."""
    head = [name.removeprefix(">") for name in columns]
    rule = ["---:" if name.startswith(">") else "---" for name in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (map(_escaped, head), rule, *(map(_escaped, row) for row in rows)))


def _escaped(text: str) -> str:
    """`text` in which nothing is Markdown or HTML, on one line; a `#` that starts a heading stays one."""
    line = " ".join(text.split())
    line = re.sub(r"[\\`*<>|~&]", r"\\\g<0>", line)
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # inside a word it is none
    return re.sub(r"\](?=[(\[:])", r"\\]", line)  # a link, unless nothing follows
