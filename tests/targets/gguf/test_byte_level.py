"""Byte-level BPE: llama.cpp's pre-tokenizer by the file's own, or a refusal that names it. (Ids: tests/clients/test_tokenizers.py.)"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.checkpoint.tokenizer.probes import PROBES
from elmexport.errors import ElmExportError
from elmexport.runtimes.llama_cpp_tokenizer import LlamaCppTokenizer
from targets.gguf.tokenizer import find_vocabulary
from tests.checkpoint.tokenizer.vocabularies import GPT2, LLAMA3, QWEN2, added, byte_level, change, in_gguf

QWEN35 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("pattern", "options", "pre"),
    [
        (GPT2, {}, "gpt-2"),
        (GPT2, {"nfc": True}, "olmo"),
        (GPT2, {"digits": True}, "smollm"),
        (GPT2, {"digits": True, "nfc": True}, "command-r"),
        (LLAMA3, {"ignore_merges": True}, "llama-bpe"),
        (LLAMA3, {}, "smaug-bpe"),
        (QWEN2, {"nfc": True}, "qwen2"),
        (QWEN35, {"nfc": True}, "qwen35"),
    ],
)
def test_pre_tokenizers(tmp_path: Path, pattern: str, options: dict[str, bool], pre: str) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer.json", pattern, specials=["</s>"], **options))
    vocabulary = find_vocabulary(tokenizer)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", pre)
    assert [note[:32] for note in vocabulary.notes] == (["the tokenizer composes characters"[:32]] if "nfc" in options else [])
    found = LlamaCppTokenizer(in_gguf(tokenizer, tmp_path / "x.gguf"))
    for text in PROBES:
        text = unicodedata.normalize("NFC", text) if "nfc" in options else text
        assert found.encode(text) == tokenizer.encode(text), text
        assert found.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text


def test_the_gpt2_pattern_spelled_out(tmp_path: Path) -> None:
    """As a step of its own, with the parts that it keeps said the other way round, as OLMo 2's file does."""
    path = byte_level(tmp_path / "tokenizer.json", specials=["</s>"])
    split = {"type": "Split", "pattern": {"Regex": GPT2}, "behavior": "Removed", "invert": True}
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    change(path, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, bytes_alone]})
    assert find_vocabulary(load_tokenizer(path)).pre == "gpt-2"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\p{Lu}+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ]}},
            r"splits texts by \p{Lu}+, with words built by merges; none of llama.cpp's pre-tokenizers that elmexport knows does the same",
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Punctuation", "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ]}},
            "splits texts in a way that llama.cpp does not (Punctuation, behavior 'Isolated')",
        ),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "puts a space before a text's first word (add_prefix_space)",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "normalizes texts (Lowercase)"),
        ({"added_tokens": [added(0, "</s>"), added(600, "<x>", special=False, rstrip=True)]}, "takes the spaces around it ('<x>')"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    path = byte_level(tmp_path / "tokenizer.json", specials=["</s>"])
    change(path, **parts)
    with pytest.raises(ElmExportError, match=re.escape(message)) as raised:
        find_vocabulary(load_tokenizer(path))
    assert len(str(raised.value)) < 600


def test_words_that_are_taken_as_they_are(tmp_path: Path) -> None:
    """llama.cpp does that for Llama 3's pattern only."""
    path = byte_level(tmp_path / "tokenizer.json", QWEN2, ignore_merges=True, specials=["</s>"])
    with pytest.raises(ElmExportError, match=r"with words that are pieces taken as they are \(ignore_merges\)"):
        find_vocabulary(load_tokenizer(path))


def test_bytes_without_a_piece(tmp_path: Path) -> None:
    """Bytes that no ordinary text has may lack a piece, as in published vocabularies; others may not."""
    path = byte_level(tmp_path / "tokenizer.json", specials=["</s>"])
    model = change(path)["model"]

    def without(*characters: str) -> None:
        """Their ids are left to pieces that nothing is merged into."""
        vocab = {f"\u00e9{text}" if text in characters else text: i for text, i in model["vocab"].items()}
        change(path, model=model | {"vocab": vocab, "merges": [m for m in model["merges"] if not set("".join(m)) & set(characters)]})

    without("\u00c0", "\u00f5", "\u0104")  # C0, F5, 04
    assert find_vocabulary(load_tokenizer(path)).pre == "gpt-2"
    without("\u00e2")
    with pytest.raises(ElmExportError, match=r"has no piece for some bytes \('â'\)"):
        find_vocabulary(load_tokenizer(path))
