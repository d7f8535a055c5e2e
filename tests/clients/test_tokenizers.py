"""One text, one list of ids: SentencePiece's or the tokenizers library's of the model's own file, and those of every file in an artifact.

The files are read by the libraries that own them: `tokenizers`, and llama.cpp. A vocabulary that a format cannot carry exactly is refused; what is
refused where is tested in tests/targets/gguf/test_gguf_tokenizer.py and tests/checkpoint/tokenizer/test_convert.py. Some of these texts only
have to differ by the order of equally likely pieces (unigram).
"""

from __future__ import annotations

import json
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elmexport.checkpoint.tokenizer import Tokenizer, load_tokenizer
from elmexport.checkpoint.tokenizer.clients import write_tokenizer_files
from elmexport.errors import ElmExportError
from elmexport.runtimes.llama_cpp_tokenizer import LlamaCppTokenizer
from tests.checkpoint.tokenizer.vocabularies import GPT2, HEX, LLAMA3, QWEN2, added, byte_level, change, in_gguf, sentencepiece_model

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")

IM_END, TOOL = "<|im_end|>", "<tool>"
SPELLED = ("</s>", "<s>", "<unk>", "<0x41>", IM_END, TOOL, "[PAD3]", "  ")
CHARACTERS = "abcde  ...  -=01é\u0301ñか\u3099Ａ½🙂👩\u200d日本ไя\n\t'ST"


@dataclass(frozen=True)
class Vocabulary:
    """How a model's vocabulary is made."""

    kind: str  # "bpe", "unigram", or a pattern of byte-level BPE
    byte_fallback: bool = True
    dummy_prefix: bool = True
    extra_spaces: bool = True  # kept
    normalization: str = "identity"
    gap: int | None = None  # added tokens stand so far behind; None: there are none
    alphabet: str = CHARACTERS
    nfc: bool = False


sentencepieces = st.builds(
    Vocabulary,
    kind=st.sampled_from(["bpe", "unigram"]),
    byte_fallback=st.booleans(),
    dummy_prefix=st.booleans(),
    extra_spaces=st.booleans(),
    normalization=st.sampled_from(["identity", "identity", "nmt_nfkc"]),
    gap=st.sampled_from([None, 0, 2]),
    alphabet=st.sampled_from([CHARACTERS, "ab ", "a<>/s 0x41"]),
)
byte_levels = st.builds(
    Vocabulary,
    kind=st.sampled_from([GPT2, LLAMA3, QWEN2]),
    gap=st.sampled_from([None, 0, 2]),
    nfc=st.booleans(),
    alphabet=st.just(CHARACTERS),
)
texts = st.lists(
    st.lists(st.one_of(st.sampled_from(CHARACTERS), st.sampled_from(SPELLED), st.sampled_from("ab ")), max_size=25).map("".join),
    min_size=12,
    max_size=12,
)


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


@cache
def trained(pattern: str, nfc: bool) -> bytes:
    with folder() as path:
        return byte_level(
            path / "tokenizer.json", pattern, ignore_merges=pattern == LLAMA3, nfc=nfc, specials=["</s>"], size=400
        ).read_bytes()


def model_file(vocabulary: Vocabulary, seed: int, path: Path) -> Path:
    """The model's tokenizer, its added tokens in a file beside it or in its own."""
    if vocabulary.kind not in ("bpe", "unigram"):
        made = path / "tokenizer.json"
        made.write_bytes(trained(vocabulary.kind, vocabulary.nfc))
        size = len(change(made)["model"]["vocab"])
    else:
        import random

        draw = random.Random(seed)
        lines = ["".join(draw.choice(vocabulary.alphabet) for _ in range(30)) for _ in range(150)]
        made = sentencepiece_model(
            path / "tokenizer.model",
            [line for line in lines if line.strip()],
            model_type=vocabulary.kind,
            vocab_size=340 if vocabulary.byte_fallback else 80,
            byte_fallback=vocabulary.byte_fallback,
            add_dummy_prefix=vocabulary.dummy_prefix,
            remove_extra_whitespaces=not vocabulary.extra_spaces,
            normalization_rule_name=vocabulary.normalization,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
        )
        size = sentencepiece.SentencePieceProcessor(str(made)).vocab_size()
    if vocabulary.gap is not None:
        first = size + vocabulary.gap
        if made.suffix == ".json":
            change(made, added_tokens=[*change(made)["added_tokens"], added(first, IM_END), added(first + 1, TOOL, special=False)])
        else:
            change(path / "added_tokens.json", **{IM_END: first, TOOL: first + 1})
    change(path / "tokenizer_config.json", eos_token="</s>")
    return made


class Library:
    """A tokenizer.json as a program reads it: by the library, settings untouched."""

    def __init__(self, path: Path) -> None:
        self._library = tokenizers.Tokenizer.from_file(str(path))
        self.data = json.loads(path.read_text(encoding="utf-8"))

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        self._library.encode_special_tokens = not parse_special
        ids: list[int] = self._library.encode(text).ids
        return ids


def check(vocabulary: Vocabulary, seed: int, drawn: Sequence[str]) -> None:
    with folder() as path:
        made = model_file(vocabulary, seed, path)
        carried: dict[str, Any] = {}
        try:
            tokenizer = load_tokenizer(made)
        except ElmExportError as error:
            assert vocabulary.normalization != "identity" or "no tokenizer.json gives the same ids" in str(error)
            return
        artifact = path / "artifact"
        artifact.mkdir()
        try:
            write_tokenizer_files(tokenizer, 128, artifact)
            carried["tokenizer.json"] = Library(artifact / "tokenizer.json")
        except ElmExportError as error:
            assert "no tokenizer.json gives the same ids" in str(error)
        try:
            carried["gguf"] = LlamaCppTokenizer(in_gguf(tokenizer, path / "x.gguf"))
        except ElmExportError as error:
            assert "llama.cpp would give texts other ids" in str(error)
        compare(vocabulary, tokenizer, made, carried, drawn)
        if vocabulary.gap is not None:
            for found in carried.values():
                check_added(vocabulary, tokenizer, found)


def compare(vocabulary: Vocabulary, tokenizer: Tokenizer, made: Path, carried: dict[str, Any], drawn: Sequence[str]) -> None:
    """Without added tokens in the text, against the library of the model's own file; with them, of all files."""
    own = None
    if made.suffix == ".model":
        own = sentencepiece.SentencePieceProcessor(str(made))
    for text in drawn:
        if vocabulary.nfc:  # llama.cpp does not compose characters; the export says so
            text = unicodedata.normalize("NFC", text)
        for parse in (False, True):
            ids = tokenizer.encode(text, parse_special=parse)
            if own is not None and not parse and (vocabulary.gap is None or TOOL not in text):
                assert same(vocabulary, ids, [own.bos_id(), *own.encode(text)]), (text, "SentencePiece")
            for name, found in carried.items():
                if not (looks_for_all(vocabulary, found) and not parse and any(token in text for token in SPELLED)):
                    assert same(vocabulary, found.encode(text, parse_special=parse), ids), (text, name, parse)


def looks_for_all(vocabulary: Vocabulary, found: Any) -> bool:
    """Whether control tokens are found in a text even when told not to: the library's unigram. Programs do not tell it."""
    return vocabulary.kind == "unigram" and isinstance(found, Library)


def same(vocabulary: Vocabulary, found: Sequence[int], wanted: Sequence[int]) -> bool:
    return list(found) == list(wanted) or (vocabulary.kind == "unigram" and sorted(found) == sorted(wanted))


def check_added(vocabulary: Vocabulary, tokenizer: Tokenizer, found: Any) -> None:
    """Ids with their gap, kinds: one is a control token, one is text."""
    pieces = [piece.text for piece in tokenizer.pieces()]
    first = pieces.index(IM_END)
    assert pieces[first + 1 :] == [TOOL] and all(not text for text in pieces[first - (vocabulary.gap or 0) : first])
    for parse in (False, True):
        ids = found.encode(f"a{IM_END}{TOOL}b", parse_special=parse)
        assert first + 1 in ids and ((first in ids) == parse or looks_for_all(vocabulary, found))


@pytest.mark.slow
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(vocabulary=sentencepieces, seed=st.integers(0, 99), drawn=texts)
def test_sentencepiece(vocabulary: Vocabulary, seed: int, drawn: list[str]) -> None:
    check(vocabulary, seed, drawn)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(vocabulary=byte_levels, drawn=texts)
def test_byte_level(vocabulary: Vocabulary, drawn: list[str]) -> None:
    check(vocabulary, 0, drawn)


LLAMAS = Vocabulary("bpe")
CARRIED = {  # at least these are not refused
    "Llama's kind": (LLAMAS, {"tokenizer.json", "gguf"}),
    "without a space before texts": (Vocabulary("bpe", dummy_prefix=False, gap=2), {"tokenizer.json", "gguf"}),
    "with added tokens": (Vocabulary("bpe", gap=0), {"tokenizer.json", "gguf"}),
    "without byte fallback": (Vocabulary("bpe", byte_fallback=False), {"tokenizer.json"}),
    "unigram": (Vocabulary("unigram", byte_fallback=False, dummy_prefix=False), {"tokenizer.json", "gguf"}),
    "unigram with byte fallback": (Vocabulary("unigram"), {"tokenizer.json"}),
    "SentencePiece's defaults": (Vocabulary("unigram", byte_fallback=False, extra_spaces=False, normalization="nmt_nfkc"), {"gguf"}),
    "GPT-2": (Vocabulary(GPT2, gap=0), {"tokenizer.json", "gguf"}),
    "Llama 3": (Vocabulary(LLAMA3, gap=2), {"tokenizer.json", "gguf"}),
    "Qwen": (Vocabulary(QWEN2, gap=2, nfc=True), {"tokenizer.json", "gguf"}),
}


@pytest.mark.parametrize(("vocabulary", "formats"), CARRIED.values(), ids=CARRIED.keys())
def test_is_not_refused(vocabulary: Vocabulary, formats: set[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model_file(vocabulary, 1, tmp_path))
    if "tokenizer.json" in formats:
        (tmp_path / "artifact").mkdir()
        write_tokenizer_files(tokenizer, 128, tmp_path / "artifact")
    if "gguf" in formats:
        in_gguf(tokenizer, tmp_path / "x.gguf")


def test_hex_is_in_every_vocabulary() -> None:
    """Else every unigram vocabulary with byte fallback would be refused, and nothing be tested."""
    assert set(HEX) >= set("<0x0123456789ABCDEF>")
