"""The vocabulary that llama.cpp finds in a GGUF file is the one that SentencePiece reads from the model's own file."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.text import bundled_text
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import SentencePieceTokenizer, StreamDecoder
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes.llama_cpp_tokenizer import LlamaCppTokenizer
from tests.conftest import ExportTo

TEXTS = ["", " ", "Once upon a time", "  two spaces", "café, naïve", "日本語 🦙", "a\nb\tc", "</s> <s>", bundled_text()[:2000]]


@pytest.fixture(scope="module")
def folder(tiny: Checkpoint, export_to: ExportTo) -> Path:
    return export_to(tiny, "gguf", "int8")


@pytest.fixture(scope="module")
def found(folder: Path) -> LlamaCppTokenizer:
    return LlamaCppTokenizer(folder)


@pytest.fixture(scope="module")
def expected() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(TINY_FOLDER / "tokenizer.model")


def test_vocabulary(found: LlamaCppTokenizer, expected: SentencePieceTokenizer) -> None:
    for field in ("vocab_size", "bos_id", "eos_id", "unk_id"):
        assert getattr(found, field) == getattr(expected, field)
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

    writer = GGUFWriter(tmp_path / "gpt2.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "\u010a", "<|end|>"])
    writer.add_token_types([1, 1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(4)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(ElmExportError, match=r"holds a tokenizer of another kind than Llama's"):
        LlamaCppTokenizer(tmp_path / "gpt2.gguf")
