"""The Markdown is read back by markdown-it, a parser that is not ours."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from markdown_it import MarkdownIt

from elmexport.evaluation.report.markdown import markdown
from elmexport.evaluation.results import Report
from tests.evaluation.report import examples

GATES = [examples.gate("max-drop", 2.0, 13.0, "arc_easy"), examples.gate("max-kl", 0.1, 0.0125)]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, as a reader sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level >= 4:
            found[-1][-1].append("".join(child.content for child in token.children or [] if child.type in ("text", "text_special")))
    return found


def one(*, label: str = "OpenELM-270M-onnx-int4", gates: Sequence[object] = GATES) -> Report:
    return examples.report(label, gates=gates)  # type: ignore[arg-type]


def test_tables_are_tables() -> None:
    tasks, text, gates = tables(markdown([one()]))
    assert [row[0] for row in tasks] == ["task", *examples.TASKS]
    assert {len(row) for row in tasks} == {12}
    assert [row[0] for row in text[1:]] == ["KL divergence, mean", "KL divergence, 99 %", "top-1 agreement", "perplexity"]
    assert [row[1:] for row in gates[1:]] == [["max-drop", "arc_easy: 13 against 2 allowed"], ["max-kl", "0.0125 against 0.1 allowed"]]
    assert [row[0] for row in gates] == ["outcome", "❌ failed", "passed"]


@pytest.mark.slow
def test_the_summary_comes_first() -> None:
    lines = markdown([one()]).splitlines()
    assert lines[0] == "### ❌ OpenELM-270M-onnx-int4"
    assert lines[2].startswith("1 of 2 gates failed. Largest drop: ")
    assert markdown([one(gates=[GATES[1]])]).startswith("### ✅ ")
    assert markdown([one(gates=[])]).startswith("### OpenELM")


def test_names_hold_no_markup() -> None:
    label = "a|b <img src=x> *c* `d` [e](http://f) _g_ h_i"
    text = markdown([one(label=label), one()])
    artifacts = tables(text)[0]
    assert artifacts[1][0] == f"1. {label}"
    assert {len(row) for row in artifacts} == {9}
    assert "<img" not in MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(text)


def test_a_comparison_has_artifacts_and_drops() -> None:
    artifacts, drops = tables(markdown(examples.family()))
    assert [row[0] for row in artifacts[1:]] == [f"{i}. {label}" for i, (label, *_) in enumerate(examples.FAMILY, 1)]
    assert [row[0] for row in drops[1:]] == list(examples.TASKS)
    assert {len(row) for row in drops} == {6}


def test_without_a_reference_there_are_scores_only() -> None:
    tasks, _ = tables(markdown([examples.report(reference=False)]))
    assert tasks[0] == ["task", "metric", "items", "artifact", "published"]
