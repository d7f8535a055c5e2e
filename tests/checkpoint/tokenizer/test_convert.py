"""A tokenizer.json of a SentencePiece model: what has one with the same ids, and what is refused. (Ids: tests/clients/test_tokenizers.py.)"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.checkpoint.tokenizer.clients import client_json, client_notes, write_tokenizer_files
from elmexport.checkpoint.tokenizer.probes import compare
from elmexport.errors import ElmExportError
from tests.checkpoint.tokenizer.vocabularies import byte_level, sentencepiece_model

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe"}, "normalizes texts by SentencePiece's own table (nmt_nfkc), by longest match"),
        ({"model_type": "unigram", "normalization_rule_name": "nfkc_cf"}, "normalizes texts by SentencePiece's own table (nfkc_cf)"),
        ({**PLAIN, "model_type": "bpe", "treat_whitespace_as_suffix": True}, "puts spaces at the end of words"),
        ({**PLAIN, "model_type": "bpe", "user_defined_symbols": ["<u>"]}, "has user-defined pieces ('<u>'), after which other tokenizers"),
        (
            {"model_type": "unigram", "normalization_rule_name": "identity", "user_defined_symbols": ["<u>"]},
            "is a unigram vocabulary with user-defined pieces ('<u>')",
        ),
        (
            {"model_type": "bpe", "normalization_rule_name": "identity", "add_dummy_prefix": False, "user_defined_symbols": ["<u>"]},
            "has user-defined pieces ('<u>'), whose spaces it keeps while it removes others",
        ),
        ({**PLAIN, "model_type": "char"}, "holds whole words or single characters"),
        ({**PLAIN, "model_type": "word"}, "holds whole words or single characters"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "tokenizer.model", vocab_size=400, **options))
    with pytest.raises(ElmExportError, match=re.escape(message)) as raised:
        client_json(tokenizer)
    assert "no tokenizer.json gives the same ids" in str(raised.value) and len(str(raised.value)) < 600
    (tmp_path / "out").mkdir()
    with pytest.raises(ElmExportError):
        write_tokenizer_files(tokenizer, 128, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_user_defined_pieces_without_a_space_before_texts(tmp_path: Path) -> None:
    symbols = ["<u>", "\u2581\u2581"]
    options = {**PLAIN, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True, "user_defined_symbols": symbols}
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "tokenizer.model", model_type="bpe", vocab_size=400, **options))
    (tmp_path / "out").mkdir()
    write_tokenizer_files(tokenizer, 128, tmp_path / "out")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in ("a<u>b", "<u><u> a", "two  spaces   three", " <u>  "):
        assert library.encode(text).ids == tokenizer.encode(text), text


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"model_type": "bpe", **PLAIN}, []),
        ({"model_type": "unigram", **PLAIN}, ["the vocabulary is unigram: transformers and transformers.js read it"]),
        ({"model_type": "unigram", **PLAIN, "byte_fallback": True}, ["the vocabulary is unigram: transformers reads it;"]),
        (
            {"model_type": "bpe", **PLAIN, "remove_extra_whitespaces": True},
            ["the tokenizer takes away spaces around a text and double ones"],
        ),
    ],
)
def test_what_programs_do_not_do_is_noted(tmp_path: Path, options: dict[str, Any], notes: list[str]) -> None:
    found = client_notes(load_tokenizer(sentencepiece_model(tmp_path / "tokenizer.model", vocab_size=500, **options)))
    assert len(found) == len(notes) and all(note.startswith(start) for note, start in zip(found, notes, strict=True))


def test_a_bug_in_the_conversion_would_be_seen(tmp_path: Path) -> None:
    """What is written is compared with the model on texts of many kinds; here, with another model."""
    one, other = (
        load_tokenizer(sentencepiece_model(tmp_path / f"{size}.model", model_type="bpe", vocab_size=size, **PLAIN)) for size in (300, 400)
    )
    with pytest.raises(
        ElmExportError,
        match=r"tokenizer.json would give the text .Hello, world!.* other ids than 300.model: \[.*\] instead of \[.*\] from token",
    ):
        compare(one, other, "tokenizer.json")
    compare(one, one, "tokenizer.json")


def test_probes_hold_the_added_tokens(tmp_path: Path) -> None:
    first, other = (load_tokenizer(byte_level(tmp_path / f"{name}.json", specials=["</s>", f"<{name}>"], size=300)) for name in ("x", "y"))
    with pytest.raises(ElmExportError, match=r"(<x>|other ids)"):
        compare(first, load_tokenizer(byte_level(tmp_path / "z.json", specials=["</s>"], size=299)), "z.json")
    compare(first, other, "y.json")  # a control token's text is a text like any other
