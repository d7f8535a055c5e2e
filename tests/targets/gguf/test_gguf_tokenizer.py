"""The vocabulary in the file: SentencePiece's own, piece by piece, and llama.cpp splits text with it as SentencePiece does."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.text import bundled_text
from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.checkpoint.local import open_folder
from elmexport.checkpoint.tokenizer import Piece, PieceKind, SentencePieceTokenizer, Tokenizer
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.models.openelm.config import OpenELMConfig
from targets.gguf.tokenizer import write_tokenizer
from tests.checkpoint.test_tokenizer import write_json
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint
from tests.targets.gguf.test_gguf_target import metadata

MODEL = TINY_FOLDER / "tokenizer.model"
Tokenize = Callable[[str], list[int]]


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def folder(request: pytest.FixtureRequest, tiny: Checkpoint, export_to: ExportTo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` as GGUF, with the vocabulary from either file."""
    path = MODEL
    if request.param == "tokenizer.json":
        path = write_json(MODEL, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return export_to(open_folder(TINY_FOLDER, tiny.config, Source("tiny", "embedded"), path), "gguf", "int8")


@pytest.fixture(scope="module")
def llama_cpp_tokenize(folder: Path) -> Iterator[Tokenize]:
    """llama.cpp's tokenizer over the file, called directly: nothing of ours between."""
    lib = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
    params = lib.llama_model_default_params()
    params.vocab_only = True
    (path,) = folder.glob("*.gguf")
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    vocab = lib.llama_model_get_vocab(model)
    assert lib.llama_vocab_get_add_bos(vocab) and not lib.llama_vocab_get_add_eos(vocab)

    def call(text: str) -> list[int]:
        data = text.encode()
        out = (lib.llama_token * (len(data) + 8))()
        count = lib.llama_tokenize(vocab, ctypes.c_char_p(data), len(data), out, len(out), True, False)
        assert count >= 0
        return list(out[:count])

    yield call
    lib.llama_model_free(model)


@pytest.fixture(scope="module")
def sentencepiece_tokenize() -> Tokenize:
    processor = sentencepiece.SentencePieceProcessor(str(MODEL))
    return lambda text: [processor.bos_id(), *processor.encode(text)]


@pytest.mark.parametrize(
    "text", ["", "a", "two  spaces", " lead", "trail ", "naïve café — 日本語 🙂", "\n\ttab\r\n", "</s><s><unk> x", "1,234.5"]
)
def test_llama_cpp_tokenizes_as_sentencepiece(llama_cpp_tokenize: Tokenize, sentencepiece_tokenize: Tokenize, text: str) -> None:
    assert llama_cpp_tokenize(text) == sentencepiece_tokenize(text)


def test_prose(llama_cpp_tokenize: Tokenize, sentencepiece_tokenize: Tokenize) -> None:
    assert llama_cpp_tokenize(bundled_text()) == sentencepiece_tokenize(bundled_text())


# Without U+2581, which SentencePiece takes for a space.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=60))
def test_any_text(llama_cpp_tokenize: Tokenize, sentencepiece_tokenize: Tokenize, text: str) -> None:
    assert llama_cpp_tokenize(text) == sentencepiece_tokenize(text)


def test_pieces_are_sentencepieces(tiny: Checkpoint, export_to: ExportTo) -> None:
    found = metadata(export_to(tiny, "gguf", "int8"))
    processor = sentencepiece.SentencePieceProcessor(str(MODEL))
    ids = range(processor.vocab_size())
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.pre"] == "default"
    assert found["tokenizer.ggml.tokens"] == [processor.id_to_piece(i) for i in ids]
    assert found["tokenizer.ggml.scores"] == [processor.get_score(i) for i in ids]
    kinds = {1: lambda i: True, 2: processor.is_unknown, 3: processor.is_control, 6: processor.is_byte}
    assert found["tokenizer.ggml.token_type"] == [max(kind for kind, test in kinds.items() if test(i)) for i in ids]
    special = {key: found[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "unknown")}
    assert special == {"bos": 1, "eos": 2, "unknown": 0}
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert "tokenizer.ggml.add_space_prefix" not in found  # llama.cpp's default


def test_a_smaller_vocabulary_is_padded(small_config: OpenELMConfig, small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    rows = small_config.vocab_size + 32
    config = replace(small_config, vocab_size=rows)
    arrays = dict(small_checkpoint.arrays)
    table = "transformer.token_embeddings.weight"
    arrays[table] = arrays[table][[*range(512), *range(32)]]
    found = metadata(export_to(MemoryCheckpoint(config, arrays, tokenizer_path=small_checkpoint.tokenizer_path), "gguf", "int8"))
    assert found["tokenizer.ggml.tokens"][510:] == [*found["tokenizer.ggml.tokens"][510:512], *(f"[PAD{i}]" for i in range(512, rows))]
    assert found["tokenizer.ggml.token_type"][512:] == [PieceKind.UNUSED.value] * 32
    assert "[PAD511]" not in found["tokenizer.ggml.tokens"]


def test_a_larger_vocabulary_is_an_error(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(small_checkpoint.config, small_checkpoint.arrays, tokenizer_path=MODEL)
    with pytest.raises(ElmExportError, match=r"4096 pieces, more than the 512 rows"):
        export_to(checkpoint, "gguf", "int8", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_a_tokenizer_the_file_says_so(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    found = metadata(export_to(MemoryCheckpoint(small_checkpoint.config, small_checkpoint.arrays), "gguf", "int8"))
    assert {key: value for key, value in found.items() if key.startswith("tokenizer.")} == {"tokenizer.ggml.model": "no_vocab"}
    assert found["openelm.vocab_size"] == 512


class FakeTokenizer(Tokenizer):
    """Pieces as given, "a" being piece 1."""

    path, bos_id, eos_id, unk_id = Path("fake.model"), 0, 0, 0

    def __init__(self, *texts: str) -> None:
        self.texts, self.vocab_size = texts, len(texts)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        return [1]

    def pieces(self) -> list[Piece]:
        return [Piece(text, 0.0, PieceKind.NORMAL if text else PieceKind.UNUSED) for text in self.texts]

    def _decode(self, ids: list[int]) -> str:
        return ""


def written(tokenizer: Tokenizer, rows: int, path: Path) -> GGUFReader:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "openelm")
    write_tokenizer(writer, tokenizer, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return GGUFReader(path)


def test_pieces_alike_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"fake\.model holds the piece 'x' more than once; llama\.cpp needs pieces that differ"):
        written(FakeTokenizer("b", "x", "x"), 4, tmp_path / "x.gguf")


def test_holes_become_padding(tmp_path: Path) -> None:
    fields = written(FakeTokenizer("", "\u2581a", "", "c"), 5, tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents() == ["[PAD0]", "\u2581a", "[PAD2]", "c", "[PAD4]"]


def test_a_vocabulary_without_the_leading_space_is_marked(tmp_path: Path) -> None:
    assert written(FakeTokenizer("b", "a"), 2, tmp_path / "x.gguf").fields["tokenizer.ggml.add_space_prefix"].contents() is False
    assert "tokenizer.ggml.add_space_prefix" not in written(FakeTokenizer("b", "\u2581a"), 2, tmp_path / "y.gguf").fields


def test_the_real_one_without_the_leading_space(tmp_path: Path) -> None:
    """SentencePiece's own switch for it is seen."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(MODEL.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    assert written(SentencePieceTokenizer(path), 4096, tmp_path / "x.gguf").fields["tokenizer.ggml.add_space_prefix"].contents() is False
