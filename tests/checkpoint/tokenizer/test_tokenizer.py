"""Tokenizers: both files give the ids and texts of the libraries that own the formats, and streams add up to the whole text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elmexport.checkpoint.tokenizer import ModelIds, PieceKind, SpecialIds, StreamDecoder, Tokenizer, load_tokenizer
from elmexport.checkpoint.tokenizer.huggingface import JsonTokenizer
from elmexport.checkpoint.tokenizer.sentencepiece import SentencePieceTokenizer
from elmexport.errors import ElmExportError
from elmexport.models import find_model
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.models.openelm.config import OpenELMConfig
from tests.checkpoint.tokenizer.vocabularies import GPT2, LLAMA3, QWEN2, byte_level, write_json

MODEL = TINY_FOLDER / "tokenizer.model"
TEXTS = ["Hello world", "", " ", "  two  spaces ", "héllo ☃ 𝔘 日本語", "\n\nnew\tline", "</s> <s> <unk> <0x41>", "a" * 50, "1234.5"]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=40)


@pytest.fixture(scope="module")
def json_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json(MODEL, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def both(json_path: Path) -> list[Tokenizer]:
    found = [load_tokenizer(MODEL), load_tokenizer(json_path)]
    assert [type(tokenizer) for tokenizer in found] == [SentencePieceTokenizer, JsonTokenizer]
    return found


def test_the_two_files_agree(both: list[Tokenizer]) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(MODEL))
    for tokenizer in both:
        assert tokenizer.vocab_size == 4096 and tokenizer.special == SpecialIds(bos=1, adds_bos=True, eos=(2,), unk=0)
        for text in TEXTS:
            assert tokenizer.encode(text, bos=False) == reference.encode(text), text
            assert tokenizer.encode(text) == [1, *reference.encode(text)]
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_that_have_no_text(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        hello = tokenizer.encode("Hello", bos=False)
        assert tokenizer.decode([1, *hello, 2, 4096, 31999, -1]) == "Hello"


def test_pieces(both: list[Tokenizer]) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(MODEL))
    stored, derived = (tokenizer.pieces() for tokenizer in both)
    assert [piece.text for piece in stored] == [reference.id_to_piece(i) for i in range(4096)]
    assert [piece.score for piece in stored] == [reference.get_score(i) for i in range(4096)]
    assert [piece.kind for piece in stored[:4]] == [PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.CONTROL, PieceKind.BYTE]
    assert sum(piece.kind is PieceKind.BYTE for piece in stored) == 256
    # The JSON file has no scores: those we derive are the ones that the vocabulary was made with.
    assert derived == stored


def test_kinds_are_ggufs() -> None:
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    assert {kind.name: kind.value for kind in PieceKind} == {kind.name: kind.value for kind in gguf.TokenType}


def test_added_tokens(json_path: Path, tmp_path: Path) -> None:
    data = json.loads(json_path.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 4096, "content": "<user>", "special": False})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 4097 and tokenizer.pieces()[4096].kind is PieceKind.USER_DEFINED


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=texts, text=texts)
def test_stream_adds_up(both: list[Tokenizer], prompt: str, text: str) -> None:
    for tokenizer in both:
        for start in ([], tokenizer.encode(prompt)):
            ids = [*start, *tokenizer.encode(text, bos=False)]
            stream = StreamDecoder(tokenizer, start)
            parts = [stream.feed(i) for i in ids[len(start) :]]
            assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
            assert tokenizer.decode(start) + "".join(parts) + stream.finish() == tokenizer.decode(ids)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 4095), max_size=30))
def test_stream_of_any_ids(both: list[Tokenizer], ids: list[int]) -> None:
    """A model may emit anything, unfinished characters included. (tokenizers turns a whole run of bytes into replacement characters
    once one of them is wrong, after the good ones were given out; so only SentencePiece's text is compared.)"""
    stream = StreamDecoder(both[0])
    assert "".join(stream.feed(i) for i in ids) + stream.finish() == both[0].decode(ids)
    stream = StreamDecoder(both[1])
    assert isinstance("".join(stream.feed(i) for i in ids) + stream.finish(), str)


def test_stream_waits_for_whole_characters(both: list[Tokenizer]) -> None:
    for tokenizer in both:
        prompt = tokenizer.encode("The")
        stream = StreamDecoder(tokenizer, prompt)
        snow = [3 + byte for byte in "☃".encode()]
        word = tokenizer.encode("sea", bos=False)
        assert [stream.feed(i) for i in snow] == ["", "", "☃"]
        assert "".join(stream.feed(i) for i in word) == " sea"
        assert stream.feed(snow[0]) == "" and stream.finish() == "\ufffd" and stream.finish() == ""


def test_missing_and_damaged_files(tmp_path: Path, json_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"no such tokenizer file; give a tokenizer.model or tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.model")
    for name, content in (("tokenizer.model", MODEL.read_bytes()), ("tokenizer.json", json_path.read_bytes())):
        path = tmp_path / name
        for damaged in (b"", b"not a tokenizer", content[: len(content) // 2]):
            path.write_bytes(damaged)
            with pytest.raises(ElmExportError, match=r"is not a (SentencePiece|tokenizers) file, or is damaged|has no .* token"):
                load_tokenizer(path)


def test_a_tokenizer_of_another_model(small_config: OpenELMConfig) -> None:
    tiny, large = find_model("tiny"), find_model("270M")
    assert tiny is not None and large is not None
    load_tokenizer(MODEL, ModelIds.of(tiny.config))
    load_tokenizer(MODEL, ModelIds.of(large.config))  # padding rows
    with pytest.raises(ElmExportError, match=r"has 4096 pieces, more than the 512 rows of the model's embedding; use the tokenizer"):
        load_tokenizer(MODEL, ModelIds.of(small_config))
    with pytest.raises(ElmExportError, match=r"has EOS id 2, config.json says 5"):
        load_tokenizer(MODEL, ModelIds.of(replace(tiny.config, eos_token_ids=(5,))))
    with pytest.raises(ElmExportError, match=r"has BOS id 1, config.json says 300"):
        load_tokenizer(MODEL, ModelIds.of(replace(tiny.config, bos_token_id=300)))


@pytest.fixture(scope="module", params=[GPT2, LLAMA3, QWEN2], ids=["gpt2", "llama3", "qwen2"])
def byte_level_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("bytes") / "tokenizer.json", request.param, specials=["<|endoftext|>", "<|im_start|>"])


def test_byte_level(byte_level_file: Path) -> None:
    tokenizer, library = load_tokenizer(byte_level_file), tokenizers.Tokenizer.from_file(str(byte_level_file))
    assert tokenizer.special == SpecialIds(bos=None, adds_bos=False, eos=(0,))
    for text in TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode(ids) == text
    marked = "a<|endoftext|>b"
    assert 0 not in tokenizer.encode(marked) and tokenizer.decode(tokenizer.encode(marked)) == marked
    assert tokenizer.encode(marked, parse_special=True) == library.encode(marked).ids
    assert 0 in tokenizer.encode(marked, parse_special=True)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=texts, text=texts, ids=st.lists(st.integers(0, 599), max_size=30))
def test_byte_level_streams(byte_level_file: Path, prompt: str, text: str, ids: list[int]) -> None:
    tokenizer = load_tokenizer(byte_level_file)
    start = tokenizer.encode(prompt)
    for following in (tokenizer.encode(text), ids):  # any ids too: a model may emit half a character
        stream = StreamDecoder(tokenizer, start)
        parts = [stream.feed(i) for i in following]
        assert tokenizer.decode(start) + "".join(parts) + stream.finish() == tokenizer.decode([*start, *following])
