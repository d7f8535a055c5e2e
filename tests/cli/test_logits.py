"""`elmexport logits`, on the checkpoint folder of `tiny`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elmexport.cli.logits import read_ids
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes import open_artifact
from tests.cli.conftest import Run

IDS = [1, 45, 102, 7]


@pytest.mark.parametrize("text", ["1 45 102 7\n", "1,45, 102 ,7", "1\n45\n102\n7\n\n", "[1, 45, 102, 7]\n", "[1,\n 45, 102, 7]"])
def test_forms_of_an_ids_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids.txt").write_text(text)
    assert read_ids(tmp_path / "ids.txt") == IDS


@pytest.mark.slow
def test_writes_what_the_runtime_says(run: Run, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1 45 102 7\n")
    outcome = run("logits", TINY_FOLDER, "--ids-file", "ids.txt", "--out", "x.npy")
    assert (outcome.code, outcome.out) == (0, "x.npy: float32 [4, 4096]\n")
    found = np.load("x.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, open_artifact(TINY_FOLDER).logits(IDS))


def test_the_name_is_taken_as_it_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1 2")
    assert run("logits", TINY_FOLDER, "--ids-file", "ids.txt", "--out", "x.bin").code == 0
    assert np.load(tmp_path / "x.bin").shape == (2, 4096)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 two 3", "entry 2 is 'two'; token ids are whole numbers, 0 or above"),
        (b"1 -2", "entry 2 is '-2'"),
        (b"[1, 2", "entry 1 is '[1'"),
        (b"", "no token ids"),
        (b"\xff\xfe1", "is not text"),
        (b"4096", "token id 4096 is outside the vocabulary, 0 to 4095"),
        (b"1 " * 257, "need a context of 257; this artifact holds 256"),
    ],
)
def test_bad_ids(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    run("logits", TINY_FOLDER, "--ids-file", "ids.txt", "--out", "x.npy").refused(message)
    assert not (tmp_path / "x.npy").exists()


def test_files_that_are_not_there(run: Run, tmp_path: Path) -> None:
    run("logits", TINY_FOLDER, "--ids-file", "ids.txt", "--out", "x.npy").refused("cannot read ids.txt: No such file")
    (tmp_path / "ids.txt").write_text("1")
    run("logits", TINY_FOLDER, "--ids-file", "ids.txt", "--out", "nowhere/x.npy").refused("nowhere is not a folder")
    run("logits", TINY_FOLDER, "--ids-file", "ids.txt", "--out", tmp_path).refused("Is a directory")
    run("logits", "nowhere", "--ids-file", "ids.txt", "--out", "x.npy").refused("nowhere: no such file or folder")
