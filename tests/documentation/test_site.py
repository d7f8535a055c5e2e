"""The documentation site: it builds without a warning, links lead somewhere, and nothing is fetched from elsewhere to show it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.evaluation.report import chromium

ROOT = Path(__file__).parents[2]
OUTSIDE = tuple(
    sorted(path for pattern in ("*.md", "benchmarks/*.md", "examples/*.md", "examples/*/*.md") for path in ROOT.glob(pattern))
)  # not of the site
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; every page in the navigation, every link and anchor between pages checked by MkDocs."""
    pytest.importorskip("mkdocs", reason="the documentation is built by MkDocs: pip install -c constraints.txt -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class _Loaded(HTMLParser):
    """Addresses that a browser fetches to show a page; links that a reader may follow are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetched = tag in ("img", "script", "iframe", "source", "video") or (
            tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload")
        )
        address = given.get("src") or given.get("href")
        if fetched and address:
            self.addresses.append(address)


def loaded(page: str) -> list[str]:
    parser = _Loaded()
    parser.feed(page)
    return parser.addresses


@pytest.mark.slow
def test_pages_show_without_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        for address in loaded(page.read_text(encoding="utf-8")):
            assert not re.match(r"(https?:)?//", address), f"{page.relative_to(site)} fetches {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_every_command_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    for sought in ("elmexport coreml", "elmexport eval", "--max-package-mb", "--max-kl", "int4-block128", "q4_k_m"):
        assert sought in page


@pytest.mark.slow
def test_programs_are_included(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
        assert not re.search(r"--8\s*(<|&lt;)\s*--", text), f"{page.relative_to(site)} shows an include in the place of a program"


@pytest.mark.slow
@pytest.mark.skipif(
    chromium.find() is None, reason="no chromium is on the PATH to search the site with. Install one: apt-get install chromium"
)
def test_search_in_pages_opened_from_the_disk(site: Path) -> None:
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom")
    address = (site / "guides" / "ci.html").as_uri() + "?q=perplexity"
    shown = subprocess.run([chromium.find() or "", *options, address], capture_output=True, text=True, timeout=120).stdout
    found = re.findall(r'href="([^"]+)" class="md-search-result__link', shown)
    assert any("evaluation.html" in target for target in found), found


@pytest.mark.parametrize("guide", OUTSIDE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_guides_that_are_no_pages(guide: Path) -> None:
    for target in local_links(guide.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        place = guide.parent / name if name else guide
        assert place.exists(), f"{guide.name} links to {target}"
        assert not anchor or anchor in anchors(place.read_text(encoding="utf-8")), f"{guide.name} links to {target}"


def local_links(markdown: str) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    for found in LINK.finditer(text):
        if not re.match(r"[a-z]+:", found["target"]):
            yield found["target"]


def anchors(markdown: str) -> set[str]:
    """The anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_what_the_checks_find() -> None:
    assert loaded('<a href="https://x.y"></a><img src="https://x.y/a.png"><link rel="stylesheet" href="b.css">') == [
        "https://x.y/a.png",
        "b.css",
    ]
    assert list(local_links("[a](b.md#c) [d](https://e.f)\n```\n[g](h)\n```\n")) == ["b.md#c"]
    assert anchors("# GGUF's types, with `codes`\n") == {"ggufs-types-with-codes"}
