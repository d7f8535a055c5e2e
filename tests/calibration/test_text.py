"""The calibration text: windows that are spread, do not overlap, start with BOS; files that are no text."""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from calibration.text import Use, bundled_text, random_windows, read_text, sample_windows
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import Tokenizer, load_tokenizer
from elmexport.errors import ElmExportError
from elmexport.evaluation.windows import evaluation_text


@pytest.fixture(scope="module")
def tokenizer(tiny: Checkpoint) -> Tokenizer:
    assert tiny.tokenizer_path is not None
    return load_tokenizer(tiny.tokenizer_path)


def test_the_bundled_text_is_enough(tokenizer: Tokenizer) -> None:
    """Llama's vocabulary of 32,000 needs fewer tokens than tiny's of 4096, at most as many as there are four characters each."""
    text = bundled_text("calibration")
    assert len(text) > 5 * 32768
    assert len(tokenizer.encode(text)) > 32768
    assert bundled_text("weighting")[:1000] not in text  # the self-check reads another one


def test_windows(tokenizer: Tokenizer) -> None:
    text = bundled_text("calibration")
    ids = np.array(tokenizer.encode(text, bos=False))
    sample = sample_windows(tokenizer, [text], "words", tokens=5000, window=128)
    assert sample.ids.shape == (40, 128) and sample.ids.dtype == np.int64  # 39.06 windows, rounded up
    assert (sample.tokens, sample.window, sample.words) == (5120, 128, "words")
    assert (sample.ids[:, 0] == tokenizer.bos_id).all()
    places = [_find(ids, row[1:]) for row in sample.ids]
    gaps = np.diff(places)
    assert gaps.min() >= 127  # no overlap
    assert places[0] < len(ids) / 40 * 1.1 and places[-1] > len(ids) * 38 / 40  # from one end to the other
    assert gaps.max() < 2.1 * len(ids) / 40


def _find(ids: np.ndarray, row: np.ndarray) -> int:  # type: ignore[type-arg]
    views = np.lib.stride_tricks.sliding_window_view(ids, len(row))
    (found,) = np.flatnonzero((views == row).all(axis=1))
    return int(found)


def test_deterministic_by_seed(tokenizer: Tokenizer) -> None:
    samples = [sample_windows(tokenizer, [bundled_text("calibration")], "w", tokens=1024, window=64, seed=seed) for seed in (0, 0, 1)]
    assert samples[0].sha256 == samples[1].sha256 != samples[2].sha256
    assert not np.array_equal(samples[0].ids, samples[2].ids)


def test_short_texts(tokenizer: Tokenizer) -> None:
    text = "It was a dark night. " * 3
    ids = tokenizer.encode(text)
    sample = sample_windows(tokenizer, [text], "w", tokens=10_000, window=512)
    assert sample.ids.tolist() == [ids]  # all of it, in one shorter window
    two = sample_windows(tokenizer, [text, text], "w", tokens=10_000, window=len(ids))
    assert two.ids.tolist() == [ids, ids]  # all pieces, in order
    with pytest.raises(ElmExportError, match="holds 0 tokens"):
        sample_windows(tokenizer, [""], "w", tokens=100, window=512)


def test_random_windows() -> None:
    sample = random_windows(100, 1, tokens=300, window=128)
    assert sample.ids.shape == (3, 128) and (sample.ids[:, 0] == 1).all() and sample.ids.max() < 100
    assert len(np.unique(sample.ids)) > 60


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffcafé\n".encode())
    assert read_text(path) == "café\n"
    for content, message in ((b"caf\xe9 x", r"is not UTF-8 text \(byte 3\)"), (b" \n", "is empty")):
        path.write_bytes(content)
        with pytest.raises(ElmExportError, match=message):
            read_text(path)
    with pytest.raises(ElmExportError, match=r"cannot read .*nowhere: No such file"):
        read_text(tmp_path / "nowhere")


def test_no_two_texts_that_ship_have_a_sentence_in_common() -> None:
    """What is fitted, chosen, checked, judged and evaluated on are different texts."""
    texts = {use: " ".join(bundled_text(use).split()) for use in get_args(Use)}
    texts["evaluation"] = " ".join(evaluation_text().split())
    texts["cloze"] = " ".join(" ".join((row["context"], *row["choices"])) for row in cloze_rows())
    for (name, text), (other, against) in combinations(texts.items(), 2):
        if {name, other} == {"evaluation", "cloze"}:
            continue  # both judge
        pieces = {text[start : start + 40] for start in range(len(text) - 40)}
        shared = [against[start : start + 40] for start in range(len(against) - 40) if against[start : start + 40] in pieces]
        assert not shared, (name, other, shared[:3])


def cloze_rows() -> list[dict[str, Any]]:
    path = files("elmexport.evaluation.tasks") / "cloze.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
