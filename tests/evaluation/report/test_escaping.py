"""Hostile names and texts: a page, and a comment, that differ from harmless ones in nothing but the words."""

from __future__ import annotations

from typing import Any

import pytest
from markdown_it import MarkdownIt

from elmexport.evaluation.report.html import html
from elmexport.evaluation.report.markdown import markdown
from elmexport.evaluation.results import Report
from tests.evaluation.report import examples
from tests.evaluation.report.test_html import Page

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</td></table></details></svg>",
    "</style></title><!-- & &lt; &#60;",
    "{{ 7 * 7 }}{%include 'x'%}{#",
    "a|b ||c \\| d\\",
    "*b* _i_ ~~s~~ `c` [l](javascript:x)",
    "![i](x) <http://x> &amp; [r]: x",
)


def reports(words: str) -> list[Report]:
    """One report, and two more to compare, in which everything that somebody else may have written is `words`."""
    return [examples.read(_spoiled(words, damage)) for damage in (0.5, 2.0)]


def _spoiled(words: str, damage: float) -> dict[str, Any]:
    document = examples.document(
        words, damage, target="onnx", quant=words, tasks=["arc_easy"], gates=[examples.gate("max-kl", 0.1, damage)]
    )
    document["elmexport"] = document["lm_eval"] = words
    for subject in (document["artifact"], document["reference"]):
        subject |= {"label": words, "path": f"{words}{damage}", "engine": words, "words": words, "model": {"name": words, "identity": None}}
    document["settings"]["notes"] = [words]
    task = document["tasks"].pop("arc_easy")
    task["ci_method"] = words
    for item in task["items"]:
        item |= {"text": words, "choices": [words] * len(item["choices"])}
    document["tasks"][words] = task
    document["kl"]["text"] = document["perplexity"]["text"] = words
    document["gates"] = [{**gate, "name": words, "reason": words} for gate in document["gates"]]
    return document


def harmless(words: str) -> str:
    """A name as long as `words`, for what is cut at a length."""
    return "ж" * len(words)


@pytest.mark.slow
@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.parametrize("count", [1, 2])
def test_words_are_words_on_the_page(words: str, count: int) -> None:
    hostile, plain = Page(html(reports(words)[:count])), Page(html(reports(harmless(words))[:count]))

    def without(page: Page, name: str) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, {key: value and value.replace(name, "@") for key, value in attributes.items()}) for tag, attributes in page.elements]

    assert without(hostile, words) == without(plain, harmless(words))
    assert [text.replace(words, "@") for text in hostile.texts] == [text.replace(harmless(words), "@") for text in plain.texts]
    assert sum(words in text for text in hostile.texts) > 30


@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.parametrize("count", [1, 2])
def test_words_are_words_in_a_comment(words: str, count: int) -> None:
    def parsed(name: str) -> list[tuple[str, str, str]]:
        """Every block, what is in it but text, and its text."""
        found = []
        for token in MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(markdown(reports(name)[:count])):
            children = token.children or []
            texts = [child.content for child in children if child.type in ("text", "text_special")]
            others = [child.type for child in children if child.type not in ("text", "text_special")]
            found.append((token.type, " ".join(others), "".join(texts).replace(name, "@")))
        return found

    assert parsed(words) == parsed(harmless(words))


@pytest.mark.parametrize("start", ["# a", "- a", "+ a", "1. a", "2) a", "=== a", "---"])
def test_a_paragraph_that_starts_with_a_name_stays_a_paragraph(start: str) -> None:
    document = examples.document(tasks=["arc_easy"])
    document["artifact"]["words"] = start
    types = [token.type for token in MarkdownIt("gfm-like", {"linkify": False}).parse(markdown([examples.read(document)]))]
    assert types.count("heading_open") == 1
    assert not {"bullet_list_open", "ordered_list_open", "hr"} & set(types)


def test_line_ends_in_names_end_no_line_of_a_table() -> None:
    name = "a\n\n| b |\n# c"
    (line,) = [line for line in markdown([examples.report(name), examples.report("d")]).splitlines() if line.startswith("| 1. ")]
    assert line.startswith(r"| 1. a \| b \| # c |")
