"""The HTML page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from elmexport.evaluation.report.html import html
from tests.evaluation.report import chromium, examples

PROGRAM = chromium.find()
UNSEEN = (
    "NOT TESTED: the HTML report in a browser (that it fits a phone and a desktop, light and dark, that no label lies on another, that sorting and "
    "unfolding work with the keyboard, that it loads nothing), because no chromium is on the PATH. Install one: apt-get install chromium"
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason=UNSEEN)]


@pytest.fixture(scope="module")
def page() -> Iterator[chromium.Page]:
    assert PROGRAM is not None
    with chromium.browser(PROGRAM) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    long = examples.report("a-label-without-a-break-" + "x" * 80, 2.0, tasks=["arc_easy", "mmlu_high_school_government_and_politics"])
    reports = {"one": [examples.report(gates=[examples.gate("max-drop", 2.0, 13.0, "arc_easy")])], "several": [*examples.family(), long]}
    for name, several in reports.items():
        (folder / f"{name}.html").write_text(html(several), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


@pytest.mark.parametrize("name", ["one", "several"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_and_is_quiet(page: chromium.Page, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    page.console.clear()
    page.requests.clear()
    page.open(pages[name], width=width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.console == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_of_plots_are_large_enough_and_do_not_overlap(page: chromium.Page, pages: dict[str, Path], width: int) -> None:
    page.open(pages["several"], width=width)
    drawn = page.evaluate(
        """[...document.querySelectorAll("figure > svg")].filter((svg) => svg.getClientRects().length).map((svg) =>
             [...svg.querySelectorAll("text")].map((text) => {
               const box = text.getBoundingClientRect();
               return [text.textContent, box.left, box.top, box.right, box.bottom];
             }))"""
    )
    assert len(drawn) == 5
    for labels in drawn:
        for i, (text, left, top, right, bottom) in enumerate(labels):
            assert bottom - top >= 11, f"{text} is {bottom - top} px high"
            for other, a, b, c, d in labels[:i]:
                inside = min(right, c) - max(left, a) > 1 and min(bottom, d) - max(top, b) > 3
                assert not inside, f"{text!r} lies on {other!r}"


def test_a_table_is_sorted_with_the_keyboard(page: chromium.Page, pages: dict[str, Path]) -> None:
    page.open(pages["one"], width=1280)
    table = "document.querySelector('table[data-sort]')"
    page.evaluate(f"{table}.querySelectorAll('thead button')[1].focus()")
    column = f"[...{table}.tBodies[0].rows].map((row) => Number(row.cells[1].dataset.value))"
    page.press("Enter")
    drops = page.evaluate(column)
    assert drops == sorted(drops, reverse=True) and drops[0] > drops[-1]
    assert page.evaluate(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") == "descending"
    page.press("Enter")
    assert page.evaluate(column) == sorted(drops)


def test_items_unfold_with_the_keyboard(page: chromium.Page, pages: dict[str, Path]) -> None:
    page.open(pages["one"], width=390)
    page.evaluate("document.querySelector('details.item > summary').focus()")
    page.press("Enter")
    assert page.evaluate("document.querySelector('details.item').open") is True
