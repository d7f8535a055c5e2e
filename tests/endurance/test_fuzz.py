"""Spoilt inputs of every kind, through the program's own commands. ELMEXPORT_ENDURANCE sets how many of each; unset, a sample."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.endurance.fuzz import build_corpus, fuzz, summary
from tests.endurance.kinds import KINDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of time and memory are read as Linux tells them"),
]


COUNT = int(os.environ.get("ELMEXPORT_ENDURANCE", "6"))  # of each kind


def test_no_input_ends_in_anything_but_an_answer_or_an_error(tmp_path: Path) -> None:
    build_corpus(tmp_path / "corpus")
    rows = summary(list(fuzz(tuple(KINDS), tmp_path / "corpus", 0, COUNT)))
    assert not any(row["findings"] for row in rows.values()), {name: row["findings"] for name, row in rows.items()}
    assert {name: row["inputs"] for name, row in rows.items()} == dict.fromkeys(KINDS, COUNT)
    codes = sum((row["codes"] for row in rows.values()), Counter())
    assert codes[0] and codes[2], "some inputs are to be taken, and some refused"
