"""Maker of the bundled task `cloze.jsonl` from a text: `python -m elmexport.evaluation.tasks.make_cloze TEXT cloze.jsonl`.

TEXT is plain prose whose paragraphs are divided by blank lines. An item is the first half of a paragraph and four ways to go on: the
paragraph's own words, and words at the same place of three other paragraphs of about the same length. The seed is fixed: same text, same items.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

ITEMS = 400
CONTEXT_WORDS = (24, 60)  # shown
CONTINUATION_WORDS = 6  # of each choice
SEED = 0


def paragraphs(text: str) -> list[list[str]]:
    """The words of every paragraph that is long enough, each on one line, headings and verse left out by their length."""
    words = (block.replace("_", "").split() for block in text.split("\n\n"))
    return [block for block in words if len(block) >= CONTEXT_WORDS[0] + CONTINUATION_WORDS]


def make_items(text: str) -> list[dict[str, object]]:
    """Make `ITEMS` items, spread evenly over the text."""
    blocks = paragraphs(text)
    rng = random.Random(SEED)
    step = len(blocks) / ITEMS
    items: list[dict[str, object]] = []
    for number in range(ITEMS):
        own = int(number * step)
        shown = min(CONTEXT_WORDS[1], max(CONTEXT_WORDS[0], len(blocks[own]) // 2), len(blocks[own]) - CONTINUATION_WORDS)
        others = [i for i, block in enumerate(blocks) if i != own and len(block) >= shown + CONTINUATION_WORDS]
        chosen = rng.sample(others, 3)
        chosen.insert(number % 4, own)  # every place is right equally often
        choices = [" ".join(blocks[i][shown : shown + CONTINUATION_WORDS]) for i in chosen]
        items.append({"context": " ".join(blocks[own][:shown]), "choices": choices, "label": number % 4})
    return items


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    rows = make_items(source.read_text(encoding="utf-8"))
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
