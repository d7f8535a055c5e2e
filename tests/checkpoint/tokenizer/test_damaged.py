"""Tokenizer files whose ids or pieces nothing could hold are refused before anything is computed of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2

from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from targets.gguf.tokenizer import find_vocabulary
from tests.checkpoint.tokenizer.vocabularies import write_json


def _huge_id(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["beyond"] = 4_000_000_000


def _huge_added_id(data: dict[str, Any]) -> None:
    data["added_tokens"].append(data["added_tokens"][-1] | {"id": 4_000_000_000, "content": "<|beyond|>"})


def _bos_beyond(data: dict[str, Any]) -> None:
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [70000], "tokens": ["<s>"]}},
    }


def _bos_unknown(data: dict[str, Any]) -> None:
    _bos_beyond(data)
    data["post_processor"]["single"][0]["SpecialToken"]["id"] = "<t>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_bos_unknown, "is damaged"),  # the library panics
        (_huge_id, "4000000000 is no id of a token"),
        (_huge_added_id, "4000000000 is no id of a token"),
        (_bos_beyond, "it names a token of id 70000, the vocabulary ends at 4095"),
    ],
)
def test_ids_beyond_any_vocabulary(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    path = write_json(TINY_FOLDER / "tokenizer.model", tmp_path / "tokenizer.json")
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ElmExportError, match=message):
        load_tokenizer(path)


def test_ids_of_thousands_of_digits(tmp_path: Path) -> None:
    path = write_json(TINY_FOLDER / "tokenizer.model", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"9" * 5001: {"content": "x"}}}))
    with pytest.raises(ElmExportError, match="added_tokens_decoder has"):
        load_tokenizer(path)


def test_pieces_that_are_no_text(tmp_path: Path) -> None:
    content = (TINY_FOLDER / "tokenizer.model").read_bytes()
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    piece = model.pieces[3000].piece.encode()
    assert content.count(piece) >= 1
    field = bytes([0x0A, len(piece)]) + piece  # the piece's text, field 1 of its message
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content.replace(field, field[:2] + b"\xff" * len(piece), 1))
    with pytest.raises(ElmExportError, match="is not a SentencePiece file, or is damaged"):
        load_tokenizer(path)


def test_a_normalizer_without_a_type(tmp_path: Path) -> None:
    """Which the library guesses."""
    path = write_json(TINY_FOLDER / "tokenizer.model", tmp_path / "tokenizer.json")
    data = json.loads(path.read_bytes())
    for step in data["normalizer"]["normalizers"]:
        del step["type"]
    path.write_text(json.dumps(data))
    with pytest.raises(ElmExportError, match="has a part of an unknown form"):
        find_vocabulary(load_tokenizer(path))
