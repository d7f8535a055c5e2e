"""Tokenizers: both files give the ids and texts of the libraries that own the formats, and streams add up to the whole text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elmexport.checkpoint.tokenizer import (
    JsonTokenizer,
    PieceKind,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
)
from elmexport.errors import ElmExportError
from elmexport.models import find_model
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.models.openelm.config import OpenELMConfig

MODEL = TINY_FOLDER / "tokenizer.model"
TEXTS = ["Hello world", "", " ", "  two  spaces ", "héllo ☃ 𝔘 日本語", "\n\nnew\tline", "</s> <s> <unk> <0x41>", "a" * 50, "1234.5"]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=40)


def write_json(model: Path, path: Path) -> Path:
    """The `tokenizer.json` of a SentencePiece BPE model, built with the `tokenizers` library as Llama's is: a merge for every way to
    split a piece into two, in the order of the scores."""
    from tokenizers import AddedToken, decoders, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(str(model))
    ids = range(processor.vocab_size())
    vocab = {processor.id_to_piece(i): i for i in ids}
    normal = [i for i in ids if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))]
    merges = []
    for i in sorted(normal, key=lambda i: -processor.get_score(i)):
        piece = processor.id_to_piece(i)
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted((s for s in splits if s[0] in vocab and s[1] in vocab), key=lambda s: (vocab[s[0]], vocab[s[1]]))
    built = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>")])
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(steps)
    built.save(str(path))
    return path


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
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (4096, 1, 2, 0)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"byte_fallback": False}, "holds a BPE vocabulary without byte fallback; only SentencePiece BPE"),
        ({"type": "WordLevel"}, "holds a WordLevel vocabulary"),
    ],
)
def test_other_kinds_of_vocabulary(json_path: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = json.loads(json_path.read_text())
    data["model"] |= change
    if "type" in change:
        data["model"] = {"type": "WordLevel", "vocab": data["model"]["vocab"], "unk_token": "<unk>"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ElmExportError, match=message):
        load_tokenizer(path)


def test_check_vocabulary(small_config: OpenELMConfig) -> None:
    tokenizer = load_tokenizer(MODEL)
    tiny, large = find_model("tiny"), find_model("270M")
    assert tiny is not None and large is not None
    check_vocabulary(tokenizer, tiny.config)
    check_vocabulary(tokenizer, large.config)  # padding rows
    with pytest.raises(ElmExportError, match=r"has 4096 pieces, more than the 512 rows of the model's embedding; use the tokenizer"):
        check_vocabulary(tokenizer, small_config)
    with pytest.raises(ElmExportError, match=r"has EOS id 2, config.json says 5"):
        check_vocabulary(tokenizer, replace(tiny.config, eos_token_id=5))
