"""The vocabulary that llama.cpp finds in a GGUF file is the one that SentencePiece reads from the model's own file."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.text import bundled_text
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import PieceKind, StreamDecoder, load_tokenizer
from elmexport.checkpoint.tokenizer.sentencepiece import SentencePieceTokenizer
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes.llama_cpp_tokenizer import LlamaCppTokenizer
from tests.checkpoint.tokenizer.vocabularies import GPT2, LLAMA3, QWEN2, byte_level, in_gguf, sentencepiece_model
from tests.conftest import ExportTo

TEXTS = ["", " ", "Once upon a time", "  two spaces", "café, naïve", "日本語 🦙", "a\nb\tc", "</s> <s>", bundled_text("weighting")[:2000]]


@pytest.fixture(scope="module")
def folder(tiny: Checkpoint, export_to: ExportTo) -> Path:
    return export_to(tiny, "gguf", "int8")


@pytest.fixture(scope="module")
def found(folder: Path) -> LlamaCppTokenizer:
    return LlamaCppTokenizer(folder)


@pytest.fixture(scope="module")
def expected() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(TINY_FOLDER / "tokenizer.model")


@pytest.mark.slow
def test_vocabulary(found: LlamaCppTokenizer, expected: SentencePieceTokenizer) -> None:
    assert (found.vocab_size, found.special) == (expected.vocab_size, expected.special)
    assert found.pieces() == expected.pieces()


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_text_to_ids_and_back(found: LlamaCppTokenizer, expected: SentencePieceTokenizer, text: str) -> None:
    ids = found.encode(text)
    assert ids == expected.encode(text)
    assert found.encode(text, bos=False) == ids[1:]
    assert found.decode(ids) == expected.decode(ids)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_streams(found: LlamaCppTokenizer, text: str) -> None:
    prompt, ids = found.encode("It was "), found.encode(text, bos=False)
    decoder = StreamDecoder(found, prompt)
    streamed = "".join(decoder.feed(token) for token in ids) + decoder.finish()
    assert found.decode(prompt) + streamed == found.decode(prompt + ids)


def test_a_file_without_a_vocabulary(tiny: Checkpoint, export_to: ExportTo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "tokenizer_path", None)
    folder = export_to(tiny, "gguf", "int8")
    with pytest.raises(ElmExportError, match=r"has no tokenizer inside; pass the model's with --tokenizer PATH"):
        LlamaCppTokenizer(folder)


def test_a_vocabulary_of_another_kind(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "rwkv.gguf", "llama")
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(["a", "b", "\\n"])
    writer.add_token_types([1, 1, 1])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(ElmExportError, match=r"holds a tokenizer of a kind \(rwkv\) that is not supported"):
        LlamaCppTokenizer(tmp_path / "rwkv.gguf")


def test_tokens_with_several_flags(tmp_path: Path) -> None:
    """llama.cpp makes control tokens of those that are called like some, whatever the file says; and "unused" ones."""
    from gguf import GGUFWriter

    path = byte_level(tmp_path / "tokenizer.json", specials=["<|im_end|>", "<|unused_1|>", "<x>"])
    tokenizer = load_tokenizer(path)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    pieces = tokenizer.pieces()
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_types([4, 3, 4, *(piece.kind.value for piece in pieces[3:])])
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges()])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    found = LlamaCppTokenizer(tmp_path / "x.gguf")
    assert [piece.kind for piece in found.pieces()[:3]] == [PieceKind.CONTROL, PieceKind.CONTROL, PieceKind.USER_DEFINED]
    assert 0 in found.special.eos and found.decode(found.encode("a<x>b <|im_end|> c.")) == "a<x>b <|im_end|> c."


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, QWEN2], ids=["gpt2", "llama3", "qwen2"])
def test_byte_level(tmp_path: Path, pattern: str) -> None:
    path = byte_level(tmp_path / "tokenizer.json", pattern, ignore_merges=pattern == LLAMA3, specials=["<|endoftext|>"])
    expected = load_tokenizer(path)
    found = LlamaCppTokenizer(in_gguf(expected, tmp_path / "x.gguf"))
    assert (found.special.bos, found.special.eos) == (None, (0,))
    for text in [*TEXTS, "spaces , before . punctuation ' s", "a<|endoftext|>b"]:
        for parse in (False, True):
            ids = expected.encode(text, parse_special=parse)
            assert found.encode(text, parse_special=parse) == ids and found.decode(ids) == expected.decode(ids)
        decoder = StreamDecoder(found)
        assert "".join(map(decoder.feed, expected.encode(text))) + decoder.finish() == text


def test_unigram(tmp_path: Path) -> None:
    """SentencePiece's defaults, full-width letters and double spaces among what its table and switches change."""
    expected = load_tokenizer(sentencepiece_model(tmp_path / "tokenizer.model", model_type="unigram", vocab_size=400))
    found = LlamaCppTokenizer(in_gguf(expected, tmp_path / "x.gguf"))
    for text in [*TEXTS, "Ａ  ｆｕｌｌ   ｗｉｄｔｈ ", "か\u3099 e\u0301 ½ ㎞", "   ", "a" * 40]:
        assert sorted(found.encode(text)) == sorted(expected.encode(text)), text  # equally likely ones in any order
        assert found.decode(expected.encode("The  Ａ sea")) == "The A sea"
