"""Llama's own vocabulary of 32000 pieces, which OpenELM uses: our file holds it as llama.cpp's converter does, and splits text as SentencePiece.

It comes from llama.cpp's test data, as a SentencePiece model made of its pieces.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from gguf import GGUFReader
from sentencepiece import sentencepiece_model_pb2

from calibration.text import bundled_text
from elmexport.models.openelm.config import OpenELMConfig
from tests.clients.llama_cpp_tools import LlamaCppTools
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.targets.gguf.llama_cpp_files import LlamaCppFiles, differences
from tests.targets.gguf.test_gguf_target import gguf_path

pytestmark = pytest.mark.slow

TEXTS = [
    "",
    " ",
    "   three  spaces   inside and after   ",
    "\u00a0no-break\u2003em\u3000ideographic",
    "tab\there\nnew line\r\ncarriage\x0bvertical\x0cform feed\x1b escape\x7f delete\x01 start",
    "naïve café, œuvre, ﬁ ligature, e\u0301 combining, \u202eright to left\u202c, zero\u200bwidth, soft\u00adhyphen",
    "日本語 中文 한국어 ไทย हिन्दी العربية עברית Ελληνικά Русский",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🤷🏽‍♀️",
    "\U00010348 \U0001d11e \U0002a6a5 \ufffd \ue000",  # beyond the first plane, and of no language: bytes
    "</s><s><unk> <0x41> [INST] <|im_start|> [PAD3]",
    "1234567890 3.14159 1e-6 0xFF 1,000,000",
    "def f(x):\n    return {'a': x ** 2, \"b\": [None, True]}  # ok?\n\n\n",
    "a" * 300,
    "https://example.org/a/b?c=d&e=%20f#g <b>&amp;</b> \\n \\u0041",
]


@pytest.fixture(scope="module")
def tokenizer(llama_cpp_tools: LlamaCppTools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = GGUFReader(llama_cpp_tools.source / "models" / "ggml-vocab-llama-spm.gguf").fields
    columns = [fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")]
    model = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(*columns, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, len(columns[0])
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", True, False
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def checkpoint(small_config: OpenELMConfig, tokenizer: Path) -> MemoryCheckpoint:
    return random_checkpoint(replace(small_config, vocab_size=32000), tokenizer_path=tokenizer)


def test_as_the_converter_writes_it(
    checkpoint: MemoryCheckpoint, llama_cpp_tools: LlamaCppTools, export_to: ExportTo, tmp_path: Path
) -> None:
    """Given no tokenizer, the converter takes Llama's from the very file that ours was made of."""
    bare = MemoryCheckpoint(checkpoint.config, checkpoint.arrays, name="OpenELM-small")
    files = LlamaCppFiles(llama_cpp_tools, bare, tmp_path)
    files.save(tokenizer_config=False)
    ours = MemoryCheckpoint(checkpoint.config, checkpoint.arrays, name="OpenELM-small", tokenizer_path=checkpoint.tokenizer_path)
    assert differences(gguf_path(export_to(ours, "gguf", "q8_0")), files.file("q8_0")) == []


@pytest.fixture(scope="module")
def vocabulary(checkpoint: MemoryCheckpoint, export_to: ExportTo) -> Iterator[object]:
    """llama.cpp's vocabulary of our file, called directly."""
    lib = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(os.fsencode(gguf_path(export_to(checkpoint, "gguf", "int8"))), params)
    yield lib.llama_model_get_vocab(model)
    lib.llama_model_free(model)


@pytest.mark.parametrize("text", [*TEXTS, bundled_text("weighting")], ids=[*map(str, range(len(TEXTS))), "prose"])
def test_tokens_are_sentencepieces(vocabulary: object, tokenizer: Path, text: str) -> None:
    import llama_cpp as lib

    processor = sentencepiece.SentencePieceProcessor(str(tokenizer))
    data = text.encode()
    out = (lib.llama_token * (len(data) + 8))()
    count = lib.llama_tokenize(vocabulary, ctypes.c_char_p(data), len(data), out, len(out), True, False)
    assert list(out[:count]) == [processor.bos_id(), *processor.encode(text)]
