"""Reports as one HTML file that needs nothing else: no network, no script library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files

from elmexport.evaluation.report.figures import depth_figures, drop_figure, size_figures
from elmexport.evaluation.report.html_items import items_of
from elmexport.evaluation.report.html_tables import artifact_table, gate_table, task_tables
from elmexport.evaluation.report.markup import judged, text
from elmexport.evaluation.report.overview import differences, labels
from elmexport.evaluation.report.wording import (
    against,
    any_published,
    facts,
    largest_drop,
    number,
    percent,
    text_figures,
    verdict,
)
from elmexport.evaluation.results import Report

_ITEMS = 30  # shown of one report; fewer of each of several


def html(reports: Sequence[Report]) -> str:
    """The page for one report, or for a comparison of several."""
    title = reports[0].artifact.label if len(reports) == 1 else f"{len(reports)} artifacts compared"
    sections = [(anchor, name, body) for anchor, name, body in _sections(reports) if body]
    links = "".join(f'<li><a href="#{anchor}">{text(name)}</a></li>' for anchor, name, _ in sections)
    parts = [
        f"<header><h1>{text(title)}</h1>{_summary(reports)}</header>",
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
        "<main>",
        *(
            f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{text(name)}</h2>\n{body}\n</section>'
            for anchor, name, body in sections
        ),
        "</main>",
        f'<footer class="soft"><p>{text(_made_by(reports))}</p></footer>',
    ]
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{text(title)} – what quantization cost</title>",
            '<link rel="icon" href="data:,">',
            f"<style>\n{_resource('page.css')}</style>\n</head>\n<body>",
            *parts,
            f"<script>\n{_resource('page.js')}</script>\n</body>\n</html>\n",
        )
    )


def _resource(name: str) -> str:
    return (files("elmexport.evaluation.report") / name).read_text(encoding="utf-8")


def _sections(reports: Sequence[Report]) -> Iterator[tuple[str, str, str]]:
    if len(reports) > 1:
        yield "artifacts", "Artifacts", artifact_table(reports) + _notes(reports)
        yield "size", "Size against quality", "\n".join(size_figures(reports))
    yield "gates", "Gates", gate_table(reports)
    yield "tasks", "Tasks", drop_figure(reports) + task_tables(reports)
    yield "text", "Text", _text(reports)
    yield "items", "Worst items", _items(reports)
    yield "made", "How this was measured", _method(reports)


def _summary(reports: Sequence[Report]) -> str:
    if len(reports) > 1:
        return _summary_of_several(reports)
    report = reports[0]
    outcome = verdict(report)
    mark = "" if not outcome else "✓ " if report.passed else "✗ "
    found = " ".join(filter(None, (largest_drop(report), _kl(report))))
    return (
        f'<p class="summary">{judged(mark + outcome, report.passed)} {text(found)}</p>\n'
        f'<p class="soft">{text(facts(report.artifact))}. {text(against(report))}</p>'
    )


def _summary_of_several(reports: Sequence[Report]) -> str:
    failed = [name for name, report in zip(labels(reports), reports, strict=True) if not report.passed]
    outcome = ""
    if any(report.gates for report in reports):
        outcome = f"✗ Gates failed: {', '.join(failed)}." if failed else "✓ All gates passed."
    models = ", ".join(sorted({report.artifact.model.name for report in reports}))
    return f'<p class="summary">{judged(outcome, not failed)} What quantization cost, of {text(models)}.</p>'


def _kl(report: Report) -> str:
    if report.kl is None:
        return ""
    return f"KL divergence {number(report.kl.mean)} nats per token; {percent(report.kl.top1_agreement)} % of tokens keep their most likely prediction."


def _notes(reports: Sequence[Report]) -> str:
    notes = differences(reports)
    return "<ul>" + "".join(f"<li>{text(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _text(reports: Sequence[Report]) -> str:
    rows = "" if len(reports) > 1 else "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in text_figures(reports[0]))
    return "\n".join([*([f"<dl>{rows}</dl>"] if rows else []), *depth_figures(reports)])


def _items(reports: Sequence[Report]) -> str:
    if not any(report.reference for report in reports):
        return ""
    explained = (
        "<p>The items on which the artifact lost most of its margin, that is how far the right choice stands above the best wrong one. "
        "Answers that turned from right to wrong come first.</p>"
    )
    if len(reports) == 1:
        return explained + (items_of(reports[0], _ITEMS) or "<p>No item lost any margin.</p>")
    parts = []
    for i, (name, report) in enumerate(zip(labels(reports), reports, strict=True), 1):
        body = items_of(report, max(5, _ITEMS // len(reports))) or "<p>No item lost any margin.</p>"
        parts.append(f"<details><summary>{i}. {text(name)}</summary>{body}</details>")
    return explained + "\n".join(parts)


def _method(reports: Sequence[Report]) -> str:
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
            f"Of the {len(intervals)} intervals on this page, about {round(len(intervals) / 20)} would exclude 0 by chance alone."
        )
    if any(map(any_published, reports)):
        sentences.append("Published: OpenELM's own figure for this model and number of shots, on all items of the task.")
    references = {report.reference.label: report.reference.words for report in reports if report.reference}
    sentences += [f"Reference: {label}, {words}." for label, words in references.items()]
    limits = {report.settings.get("limit") for report in reports if report.tasks}
    if len(limits) == 1:
        (limit,) = limits
        sentences.append(
            "All items of each task." if limit is None else f"At most {limit} items of each task, drawn alike for every artifact."
        )
    sentences += dict.fromkeys(f"Note: {note}." for report in reports for note in report.settings.get("notes", ()))
    return "".join(f"<p>{text(sentence)}</p>" for sentence in sentences)


def _made_by(reports: Sequence[Report]) -> str:
    versions = sorted({report.elmexport for report in reports})
    lm_eval = sorted({report.lm_eval for report in reports if report.lm_eval})
    seconds = sum(report.seconds for report in reports)
    took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return f"elmexport {', '.join(versions)}" + (f", lm-eval {', '.join(lm_eval)}" if lm_eval else "") + f"; evaluation took {took}"
