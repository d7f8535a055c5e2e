"""Structure of the HTML page; tests/evaluation/report/test_page.py shows it to a browser."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from importlib.resources import files

import msgspec
import pytest

from elmexport.evaluation.report.html import html
from elmexport.evaluation.results import Report
from tests.evaluation.report import examples

VOID = {"meta", "link", "br"}
GATES = [examples.gate("max-drop", 2.0, 13.0, "arc_easy"), examples.gate("max-kl", 0.1, 0.0125)]


class Page(HTMLParser):
    """Elements with their attributes and texts; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def broken() -> Report:
    """Report whose distributions are not finite, as a broken artifact's would be."""
    report = examples.report("broken", tasks=["arc_easy"])
    assert report.kl is not None
    bucket = msgspec.structs.replace(report.kl.by_depth[0], mean=math.inf, p99=math.nan)
    return msgspec.structs.replace(
        report, kl=msgspec.structs.replace(report.kl, mean=math.inf, p99=math.inf, max=math.nan, by_depth=(bucket,))
    )


def bare() -> Report:
    """Report of neither tasks nor text."""
    return msgspec.structs.replace(examples.report(tasks=[]), kl=None, perplexity=None, blocks=None)


CASES = {
    "one": [examples.report(gates=GATES)],
    "five": examples.family(),
    "no reference": [examples.report(reference=False)],
    "nothing lost": [examples.report(damage=0.0, tasks=["arc_easy", "boolq"])],
    "huge KL": [examples.report(kl=14.0, tasks=["arc_easy"])],
    "not finite": [broken()],
    "not finite among others": [broken(), *examples.family()[:2]],
    "text only": [examples.report(tasks=[])],
    "bare": [bare()],
    "one item": [examples.report(tasks=["arc_easy"], items=1)],
}


@pytest.fixture(params=CASES)
def page(request: pytest.FixtureRequest) -> tuple[str, Page]:
    text = html(CASES[request.param])
    return text, Page(text)


def test_it_is_well_formed_and_needs_nothing_else(page: tuple[str, Page]) -> None:
    text, parsed = page
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith("#") or target == "data:,", f"{tag} refers to {target}"
        assert not [name for name in attributes if name.startswith("on")], f"{tag} has a handler"
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(parsed.all("script")) == 1


def test_anchors_lead_somewhere_and_ids_are_unique(page: tuple[str, Page]) -> None:
    _, parsed = page
    ids = Counter(attributes["id"] for _, attributes in parsed.elements if "id" in attributes)
    assert max(ids.values()) == 1
    assert {str(a["href"])[1:] for a in parsed.all("a")} <= set(ids)
    assert {s["aria-labelledby"] for s in parsed.all("section")} <= set(ids)


def test_every_drawing_is_xml_and_has_a_text_instead(page: tuple[str, Page]) -> None:
    text, parsed = page
    drawings = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(drawings) == len(parsed.all("svg"))
    for drawing in drawings:
        ET.fromstring(drawing)
        coordinates = re.findall(r' (?:[xy][12]?|c[xy]|points)="([^"]*)"', drawing)
        assert coordinates and not [values for values in coordinates if re.search("nan|inf", values)]
    for attributes in parsed.all("svg"):
        assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])


def test_plots_have_units_and_a_table_of_the_same_figures() -> None:
    text = html(CASES["five"])
    for words in (
        "drop, percentage points",
        "KL divergence, mean, nats per token",
        "depth in the text, tokens",
        "size of the artifact, MB",
    ):
        assert text.count(words) >= 2, words  # for wide pages and for narrow ones
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(figures) == 5  # size against KL, size against drop, drops, KL by depth: mean and 99 %
    assert sum("<table" in figure for figure in figures) == 3  # drops stand in the tables of the tasks, both KL plots in one
    assert "1.80e" not in text


def test_texts_of_items_are_text() -> None:
    report = examples.report(tasks=["arc_easy"], damage=2.0)
    parsed = Page(html([report]))
    shown = "".join(parsed.texts)
    assert "<script>alert('an item may hold markup')</script>" in shown
    assert '" onload="x' in shown
    assert len(parsed.all("script")) == 1
    assert "القاهرة" in shown and "富士山" in shown
    assert {div.get("dir") for div in parsed.all("div") if div.get("class") == "text"} == {"auto"}


def test_control_characters_and_long_texts_are_shown_as_far_as_they_can_be() -> None:
    report = examples.report(tasks=["arc_easy"], damage=2.0)
    task = report.tasks["arc_easy"]
    items = tuple(msgspec.structs.replace(item, text="begins \x00\x1b " + "long " * 2000 + "ends") for item in task.items)
    text = html([msgspec.structs.replace(report, tasks={"arc_easy": msgspec.structs.replace(task, items=items)})])
    assert "\x00" not in text and "\x1b" not in text
    assert "The last 4,000 of 10,014 characters:" in text
    assert "begins" not in text and "ends</div>" in text


def test_worst_items_show_scores_of_both_models() -> None:
    report = examples.report(tasks=["boolq"])
    text = html([report])
    flipped = [
        item
        for item in report.tasks["boolq"].items
        if item.reference is not None and item.reference.metrics["acc"] == 1 and item.metrics["acc"] == 0
    ]
    for item in flipped:
        assert item.reference is not None
        for score in (*item.reference.scores, *item.scores):
            assert f'<td class="num">{score:.2f}</td>'.replace("-", "−") in text
    assert text.count("right → wrong</span>") == len(flipped)


def test_a_page_says_noise_in_words_and_marks_more_than_by_colour() -> None:
    text = html(CASES["one"])
    assert re.search(r"within noise: 100 items cannot show a drop below \d+\.\d points", text)
    assert "✗ failed" in text and "✓ passed" in text
    assert "the gate allows, 2 points" in text


def test_what_is_not_finite_is_said_and_not_drawn() -> None:
    text = html(CASES["not finite among others"])
    assert "Not drawn, for want of finite figures: broken." in text
    assert "∞" in text


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_meets_wcag_aa(scheme: str) -> None:
    css = (files("elmexport.evaluation.report") / "templates" / "page.css").read_text()
    block = css.split("prefers-color-scheme: dark")[scheme == "dark"]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block.split("* {")[0]))
    for name in ("ink", "soft", "bad", "good", "link", *(f"s{i}" for i in range(6))):
        for ground in ("paper", "tint"):
            a, b = sorted((_luminance(colours[name]), _luminance(colours[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (name, ground)
