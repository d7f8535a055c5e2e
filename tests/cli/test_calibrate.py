"""`elmexport calibrate`: its summary, its JSON, the files it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calibration.calibrate import DEFAULT_TOKENS, make_sample
from calibration.collect import collect
from calibration.residual import choose_alpha
from calibration.statistics import load_statistics
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from targets.gguf.imatrix import read_imatrix
from tests.cli.conftest import Run
from tests.memory_checkpoint import random_checkpoint


@pytest.mark.slow
def test_summary_and_file(run: Run, tiny: Checkpoint, tmp_path: Path) -> None:
    outcome = run("calibrate", "--tokens", 1024)
    assert outcome.code == 0 and outcome.err == ""
    facts = dict(line.split("  ", 1) for line in outcome.out.splitlines() if not line.startswith("largest channel"))
    assert facts["model"].strip() == "OpenELM-tiny"
    assert facts["text"].strip() == "bundled calibration text: 1,024 tokens in windows of 256"
    assert "fp16 needs no residual scale" in facts["residual peak"]
    assert outcome.out.count("times the average, in transformer.") == 3
    found = load_statistics(tmp_path / "OpenELM-tiny-calibration.safetensors", tiny)
    expected = collect(tiny, make_sample(tiny, tokens=1024))
    assert found.facts == expected.facts
    assert [path.name for path in tmp_path.iterdir()] == ["OpenELM-tiny-calibration.safetensors"]


@pytest.mark.slow
def test_json(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 200, encoding="utf-8")
    outcome = run("calibrate", "--text", "my.txt", "--tokens", 512, "--window", 64, "--hessian", "--out", "a", "--imatrix", "b", "--json")
    facts = json.loads(outcome.out)
    assert outcome.code == 0 and outcome.err == ""
    assert (facts["path"], facts["imatrix"], facts["hessian"]) == ("a", "b", True)
    assert facts["bytes"] == (tmp_path / "a").stat().st_size
    assert facts["text"]["words"] == "my.txt" and (facts["text"]["tokens"], facts["text"]["window"]) == (512, 64)
    assert facts["residual_peak"] == max(facts["residual_peaks"]) and facts["alpha"] == choose_alpha(facts["residual_peak"])
    assert len(facts["outliers"]) == 25
    assert read_imatrix(tmp_path / "b").chunks == 8


@pytest.mark.slow
def test_a_stream_beyond_fp16(run: Run, tiny: Checkpoint, tmp_path: Path) -> None:
    """The same weights, but what is added to the stream 2^12 times larger: its peak leaves fp16, and alpha brings it back."""
    tensors = {name: tiny.tensor(name).float() for name in tiny.specs}
    for name in tensors:
        if name.endswith(("out_proj.weight", "proj_2.weight")):
            tensors[name] *= 4096
    save_checkpoint(tmp_path / "inflated", tiny.config, tensors)
    given = ("--tokens", 512, "--json", "--tokenizer", TINY_FOLDER)
    facts = json.loads(run("calibrate", "--model", tmp_path / "inflated", "--out", "a", *given).out)
    assert facts["alpha"] <= 2**-5 and facts["residual_peak"] * facts["alpha"] * 4 <= 65504
    assert facts["residual_peak"] * facts["alpha"] * 8 > 65504
    outcome = run("calibrate", "--model", tmp_path / "inflated", "--out", "b", "--tokens", 512, "--tokenizer", TINY_FOLDER)
    assert f"fp16 exports scale it by {facts['alpha']:g}" in outcome.out


@pytest.mark.slow
def test_random_weights_without_a_tokenizer(run: Run, tmp_path: Path) -> None:
    given = ("calibrate", "--random-weights", 3, "--tokenizer", "none", "--tokens", 256)
    outcome = run(*given, "--out", "a", "--json")
    assert json.loads(outcome.out)["text"]["words"] == "pseudo-random ids"
    (tmp_path / "my.txt").write_text("text")
    run(*given, "--text", "my.txt", "--out", "b").refused("has no tokenizer to read the text with; pass one with --tokenizer PATH")


@pytest.mark.slow
def test_a_short_text_is_noted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("It was a dark and stormy night.")
    outcome = run("calibrate", "--text", "my.txt")
    assert outcome.code == 0
    assert (
        outcome.err.startswith("note: the text holds ")
        and f"fewer than the {DEFAULT_TOKENS:,} asked for; all of it was read" in outcome.err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt"), "cannot read nowhere.txt: No such file"),
        (("--text", "bytes.bin"), "bytes.bin is not UTF-8 text (byte 0)"),
        (("--text", "my.txt", "--dataset", "bundled"), "--text and --dataset bundled exclude each other"),
        (("--window", "257"), "--window is 257; OpenELM-tiny takes 2 to 256 tokens at once"),
        (("--out", "my.txt"), "my.txt exists already; pass --force"),
        (("--imatrix", "my.txt"), "my.txt exists already; pass --force"),
        (("--model", "nowhere"), "unknown model 'nowhere'"),
    ],
)
def test_refused(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "my.txt").write_text("text")
    (tmp_path / "bytes.bin").write_bytes(bytes(np.arange(256, dtype=np.uint8)[::-1]))
    run("calibrate", "--tokens", 256, *arguments).refused(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.bin", "my.txt"]


@pytest.mark.slow
def test_statistics_of_another_model_are_refused(run: Run, tiny: Checkpoint, tmp_path: Path) -> None:
    assert run("calibrate", "--tokens", 256, "--out", "a").code == 0
    with pytest.raises(ElmExportError, match="statistics of another model: OpenELM-tiny"):
        load_statistics(tmp_path / "a", random_checkpoint(tiny.config))
