"""Which kind of checkpoint a `--model` value opens, and which tokenizer comes with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from elmexport.checkpoint import open_checkpoint, require_tokenizer
from elmexport.checkpoint.base import Source
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.models.openelm.catalog import TINY_FOLDER


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `tiny` without its tokenizer, on a machine that has no other and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(TINY_FOLDER, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.model"))
    return tmp_path / "bare"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("370M", r"unknown model '370M'. Did you mean 270M or 450M\? Known: tiny, tiny-moe, 270M, .*; or give a hub id"),
        ("tony", r"Did you mean tiny or tiny-moe\?"),
        ("xyzzy", r"unknown model 'xyzzy'. Known: tiny"),
        ("./tiny", "--model ./tiny: no such file or folder"),
        ("weights/last.pt", "--model weights/last.pt: no such file or folder"),
    ],
)
def test_unknown_names(model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ElmExportError, match=message):
        open_checkpoint(model)


def test_revision_is_for_the_hub() -> None:
    with pytest.raises(ElmExportError, match="--revision abc applies to models from the hub; 'tiny' is not downloaded"):
        open_checkpoint("tiny", revision="abc")


def test_a_folder_goes_before_an_alias_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert open_checkpoint("tiny").source.origin == "embedded"  # a folder of other things is no model
    shutil.copytree(TINY_FOLDER, tmp_path / "tiny", dirs_exist_ok=True)
    checkpoint = open_checkpoint("tiny")
    assert checkpoint.source == Source("tiny", "local folder")
    assert checkpoint.notes == [
        f"--model tiny is the local folder {tmp_path / 'tiny'}; the model that `elmexport models` calls tiny was not used"
    ]
    assert open_checkpoint("./tiny").notes == []


def test_tokenizer_of_the_folder_or_of_the_option(bare: Path, small_tokenizer: Path) -> None:
    assert open_checkpoint(str(TINY_FOLDER)).tokenizer_path == TINY_FOLDER / "tokenizer.model"
    assert open_checkpoint("tiny", tokenizer=str(small_tokenizer)).tokenizer_path == small_tokenizer
    assert open_checkpoint("tiny", tokenizer=str(small_tokenizer.parent)).tokenizer_path == small_tokenizer
    assert open_checkpoint("tiny", tokenizer="none").tokenizer_path is None
    (bare / "tokenizer.json").touch()
    assert open_checkpoint(str(bare)).tokenizer_path == bare / "tokenizer.json"


@pytest.mark.parametrize("given", ["/nowhere/tokenizer.model", "tokenizer.json", "nowhere"])
def test_tokenizer_that_is_not_there(given: str) -> None:
    with pytest.raises(ElmExportError, match=f"--tokenizer {given}: no such file; give a tokenizer.model or tokenizer.json, a folder"):
        open_checkpoint("tiny", tokenizer=given)


def test_tokenizer_folder_without_one(bare: Path) -> None:
    with pytest.raises(ElmExportError, match=r"the folder holds neither tokenizer\.json nor tokenizer\.model"):
        open_checkpoint("tiny", tokenizer=str(bare))


def test_folder_without_a_tokenizer_opens_and_says_what_is_missing_when_asked(bare: Path) -> None:
    checkpoint = open_checkpoint(str(bare))
    assert checkpoint.tokenizer_path is None
    with pytest.raises(MissingDependencyError) as caught:
        require_tokenizer(checkpoint)
    for part in ("bare comes without a tokenizer", "meta-llama/Llama-2-7b-hf", "HF_HUB_OFFLINE", "--tokenizer PATH"):
        assert part in str(caught.value)
    assert require_tokenizer(open_checkpoint("tiny")) == TINY_FOLDER / "tokenizer.model"


def test_random_weights_of_a_folders_shapes(tmp_path: Path) -> None:
    shutil.copy(TINY_FOLDER / "config.json", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path), random_weights=1)
    assert checkpoint.source.name == f"{tmp_path.name}-random1" and checkpoint.tokenizer_path is None
    assert checkpoint.config.to_dict()["num_kv_heads"] == json.loads((tmp_path / "config.json").read_text())["num_kv_heads"]
