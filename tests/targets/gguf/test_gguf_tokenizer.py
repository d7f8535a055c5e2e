"""The vocabulary in the file: SentencePiece's own, piece by piece, and llama.cpp splits text with it as SentencePiece does."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from calibration.text import bundled_text
from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.checkpoint.local import open_folder
from elmexport.checkpoint.tokenizer import ModelIds, PieceKind, Tokenizer, load_tokenizer
from elmexport.checkpoint.tokenizer.sentencepiece import SentencePieceTokenizer
from elmexport.errors import ElmExportError
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.runtimes.llama_cpp_tokenizer import LlamaCppTokenizer
from targets.gguf.tokenizer import find_vocabulary
from tests.checkpoint.tokenizer.vocabularies import added, change, in_gguf, sentencepiece_model, write_json
from tests.conftest import ExportTo, MadeOnce
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["", "a", "two  spaces", " lead", "trail ", "naïve café — 日本語 🙂", "\n\ttab\r\n", "</s><s><unk> x", "1,234.5"]
)
def test_llama_cpp_tokenizes_as_sentencepiece(llama_cpp_tokenize: Tokenize, sentencepiece_tokenize: Tokenize, text: str) -> None:
    assert llama_cpp_tokenize(text) == sentencepiece_tokenize(text)


def test_prose(llama_cpp_tokenize: Tokenize, sentencepiece_tokenize: Tokenize) -> None:
    assert llama_cpp_tokenize(bundled_text("weighting")) == sentencepiece_tokenize(bundled_text("weighting"))


# Without U+2581, which SentencePiece takes for a space.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=60))
def test_any_text(llama_cpp_tokenize: Tokenize, sentencepiece_tokenize: Tokenize, text: str) -> None:
    assert llama_cpp_tokenize(text) == sentencepiece_tokenize(text)


@pytest.mark.slow
def test_pieces_are_sentencepieces(tiny_artifact: MadeOnce) -> None:
    found = metadata(tiny_artifact("gguf", "int8"))
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


def written(tokenizer: Tokenizer, rows: int, path: Path) -> Mapping[str, Any]:
    """The metadata of a file with the vocabulary of `tokenizer`."""
    return {name: field.contents() for name, field in GGUFReader(in_gguf(tokenizer, path, rows)).fields.items()}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """`tiny`'s vocabulary as a tokenizer.json, to be changed."""
    return write_json(MODEL, tmp_path / "tokenizer.json")


def test_pieces_alike_are_an_error(copy: Path, tmp_path: Path) -> None:
    change(copy, added_tokens=[*change(copy)["added_tokens"], added(4096, "[PAD4098]")])
    with pytest.raises(ElmExportError, match=r"holds the piece '\[PAD4098\]' more than once; llama\.cpp needs pieces that differ"):
        written(load_tokenizer(copy), 4100, tmp_path / "x.gguf")


def test_gaps_become_padding(copy: Path, tmp_path: Path) -> None:
    change(copy, added_tokens=[*change(copy)["added_tokens"], added(4098, "<|im_end|>")])
    found = written(load_tokenizer(copy), 4100, tmp_path / "x.gguf")
    assert found["tokenizer.ggml.tokens"][4096:] == ["[PAD4096]", "[PAD4097]", "<|im_end|>", "[PAD4099]"]
    assert found["tokenizer.ggml.token_type"][4096:] == [5, 5, 3, 5]


def test_a_vocabulary_without_the_leading_space_is_marked(tmp_path: Path) -> None:
    """SentencePiece's own switch for it is seen."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(MODEL.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    assert written(SentencePieceTokenizer(path), 4096, tmp_path / "x.gguf")["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.slow
def test_special_ids(copy: Path, tmp_path: Path, tiny: Checkpoint) -> None:
    """What ends a text: end of text, of turn, of message; and what else the files beside say."""
    tokens = ["<|im_start|>", "<|im_end|>", "<stop>", "<pad>"]
    change(copy, added_tokens=[*change(copy)["added_tokens"], *(added(4096 + i, text) for i, text in enumerate(tokens))])
    change(
        tmp_path / "tokenizer_config.json", eos_token="<|im_end|>", pad_token="<pad>", add_bos_token=False, chat_template="{{ messages }}"
    )
    model = ModelIds(1, (2, 4098), 4100)
    tokenizer = load_tokenizer(copy, model)
    found = written(tokenizer, 4100, tmp_path / "x.gguf")
    keys = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "padding_token_id", "add_bos_token")
    assert [found.get(f"tokenizer.ggml.{key}") for key in keys] == [1, 2, 4098, 4097, 4099, False]
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    read = LlamaCppTokenizer(tmp_path / "x.gguf")
    assert read.special == replace(tokenizer.special, eos=(2, 4098, 4097)) and read.chat_template == "{{ messages }}"
    assert set(tokenizer.special.eos) == {2, 4097, 4098}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe"}, "normalizes texts by SentencePiece's own table (nmt_nfkc)"),
        ({"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True}, "takes away extra spaces"),
        ({"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}, "has no byte fallback"),
        (
            {
                "model_type": "bpe",
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "byte_fallback": True,
                "user_defined_symbols": ["<u>"],
            },
            "has user-defined pieces ('<u>')",
        ),
        ({"model_type": "unigram", "byte_fallback": True}, "is a unigram vocabulary with byte fallback"),
        ({"model_type": "unigram", "user_defined_symbols": ["<u>"]}, "with user-defined or unused pieces ('<u>')"),
        ({"model_type": "unigram", "add_dummy_prefix": False}, "takes away extra spaces but puts none before texts"),
        ({"model_type": "unigram", "remove_extra_whitespaces": False}, "puts a space before texts but keeps extra ones"),
        ({"model_type": "char"}, "holds whole words or single characters"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_splits_otherwise(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "tokenizer.model", vocab_size=400, **options))
    with pytest.raises(ElmExportError, match=re.escape(message)) as raised:
        find_vocabulary(tokenizer)
    assert "llama.cpp would give texts other ids. Export to onnx or coreml" in str(raised.value) and len(str(raised.value)) < 600


def test_text_that_spells_a_byte(tmp_path: Path) -> None:
    """llama.cpp joins any two pieces that make a third, also one that is a byte: with the right pieces it takes "<0x41>" for A."""
    lines = ["x<0x41> y<0x41 z<0x41> w<0x4"] * 50
    options = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "split_by_unicode_script": False,
        "split_by_number": False,
    }
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "tokenizer.model", lines, model_type="bpe", vocab_size=320, **options))
    assert any(piece.text == "<0x41" for piece in tokenizer.pieces())
    with pytest.raises(ElmExportError, match=r"has pieces of which '<0x..>' could be joined, a token that no text has"):
        find_vocabulary(tokenizer)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizes texts (Lowercase)"),
        ({"normalizer": None}, "is neither SentencePiece's kind of BPE (spaces as U+2581) nor the byte-level kind"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits texts in a way that SentencePiece does not (Whitespace)"),
    ],
)
def test_files_that_llama_cpp_splits_otherwise(copy: Path, parts: dict[str, Any], message: str) -> None:
    change(copy, **parts)
    with pytest.raises(ElmExportError, match=re.escape(message)):
        find_vocabulary(load_tokenizer(copy))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lstrip": True}, "has an added token that takes the spaces around it ('<x>')"),
        ({"normalized": True}, "finds the added token '<x>' only after a space, because it is normalized"),
    ],
)
def test_added_tokens_that_llama_cpp_finds_elsewhere(copy: Path, flags: dict[str, bool], message: str) -> None:
    change(copy, added_tokens=[*change(copy)["added_tokens"], added(4096, "<x>", special=False, **flags)])
    with pytest.raises(ElmExportError, match=re.escape(message)):
        find_vocabulary(load_tokenizer(copy))
    change(copy, added_tokens=[*change(copy)["added_tokens"][:-1], added(4096, "<x>", special=True, **flags)])
    assert len(find_vocabulary(load_tokenizer(copy)).notes) == ("lstrip" in flags)  # a control token is in no text


def test_merges_of_another_kind(copy: Path) -> None:
    """Trained as BPE is, with one way to each piece: llama.cpp would take others too."""
    model = change(copy)["model"]
    left, right = next(merge for merge in model["merges"] if len(merge[0] + merge[1]) > 4)
    change(copy, model=model | {"merges": [merge for merge in model["merges"] if merge != [left, right]]})
    with pytest.raises(ElmExportError, match=re.escape(f"does not join {left!r} and {right!r}")):
        find_vocabulary(load_tokenizer(copy))


def test_metaspace_is_noted(copy: Path, tmp_path: Path) -> None:
    """transformers 5 writes Llama's this way: no second space before a text that begins with one, none after control tokens."""
    change(copy, normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False})
    tokenizer = load_tokenizer(copy)
    (note,) = find_vocabulary(tokenizer).notes
    assert "a text that begins with a space" in note
    found = LlamaCppTokenizer(in_gguf(tokenizer, tmp_path / "x.gguf"))
    assert found.encode("a text") == tokenizer.encode("a text") and found.encode(" a") != tokenizer.encode(" a")
    tokenizer.chat_template = "{{ messages }}"
    assert "in a chat, llama.cpp puts a space after every control token" in find_vocabulary(tokenizer).notes[1]
    change(copy, added_tokens=[*change(copy)["added_tokens"], added(4096, "<x>", special=False)])
    with pytest.raises(ElmExportError, match=r"puts no space after the added token '<x>'"):
        find_vocabulary(load_tokenizer(copy))


def test_control_tokens_that_llama_cpp_takes_for_text(copy: Path) -> None:
    change(copy, added_tokens=[*change(copy)["added_tokens"], added(4096, "<|channel|>")])
    with pytest.raises(ElmExportError, match=r"has the control token '<\|channel\|>', which llama\.cpp finds in every text"):
        find_vocabulary(load_tokenizer(copy))
