"""`elmexport inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elmexport.artifact import Artifact
from tests.cli.conftest import Run


def test_words(run: Run, artifact: Path) -> None:
    outcome = run("inspect", artifact)
    assert outcome.code == 0
    assert "OpenELM-450M" in outcome.out
    assert "int4: 4-bit blocks of 32" in outcome.out
    assert "model.gguf       1.50 MB\n" in outcome.out
    assert "tokenizer.model  1.00 kB\n" in outcome.out
    assert "Every file is what was exported" in outcome.out


def test_json(run: Run, artifact: Path) -> None:
    outcome = run("inspect", artifact, "--json")
    assert json.loads(outcome.out) == {"path": str(artifact), "problems": [], **json.loads(Artifact.open(artifact).manifest.to_json())}
    assert outcome.err == ""


def _alter(folder: Path) -> None:
    with (folder / "model.gguf").open("r+b") as file:
        file.seek(1234)
        file.write(b"!")


def _shorten(folder: Path) -> None:
    with (folder / "model.gguf").open("r+b") as file:
        file.truncate(1000)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_alter, "model.gguf has been altered"),
        (_shorten, "model.gguf has 1000 bytes, the manifest says 1500000"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model is missing"),
        (lambda folder: (folder / "extra.bin").touch(), "extra.bin is not in the manifest"),
    ],
    ids=["altered", "shortened", "missing", "extra"],
)
@pytest.mark.parametrize("options", [(), ("--json",), ("--tensors",), ("--json", "--tensors")], ids=" ".join)
def test_tampering_is_named(run: Run, artifact: Path, tamper: object, message: str, options: tuple[str, ...]) -> None:
    tamper(artifact)  # type: ignore[operator]
    outcome = run("inspect", artifact, *options)
    outcome.refused(message)
    assert "Every file is what was exported" not in outcome.out
    if "--json" in options:
        assert message in json.loads(outcome.out)["problems"][0]


def test_not_an_artifact(run: Run, artifact: Path, tmp_path: Path) -> None:
    run("inspect", "nowhere").refused("nowhere does not exist; give the folder that an export printed")
    run("inspect", artifact / "model.gguf").refused("model.gguf is a file; give the folder")
    run("inspect", tmp_path).refused("holds no manifest.json")
    (artifact / "manifest.json").write_text("{")
    run("inspect", artifact).refused("manifest.json is not JSON")
    (artifact / "manifest.json").write_text('{"format": 1}')
    run("inspect", artifact).refused("manifest.json lacks model; export it again")
