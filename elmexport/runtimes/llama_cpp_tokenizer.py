"""Tokenizer of a GGUF file: the vocabulary inside it, run by llama.cpp itself."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from elmexport.checkpoint.tokenizer import Piece, PieceKind, SpecialIds, Tokenizer
from elmexport.checkpoint.tokenizer.probes import PROBES
from elmexport.errors import ElmExportError
from elmexport.runtimes.llama_cpp import check_magic, engine, gguf_file, reason

# llama.cpp's types of a vocabulary that the runtime knows: none, SentencePiece's BPE, byte-level BPE, unigram
_NONE, _SENTENCEPIECE, _BYTE_LEVEL, _UNIGRAM = 0, 1, 2, 4
# llama.cpp's flags of a token, of which one may have several: the first that it has says what it is to a text
_KINDS = (
    (8, PieceKind.CONTROL),
    (1, PieceKind.UNKNOWN),
    (16, PieceKind.USER_DEFINED),
    (32, PieceKind.BYTE),
    (4, PieceKind.NORMAL),
    (2, PieceKind.UNUSED),
)


class LlamaCppTokenizer(Tokenizer):
    """Reads the vocabulary of `path`, an artifact folder or a `.gguf`, and none of its weights."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ElmExportError: llama.cpp cannot load the file, or it holds no vocabulary, or one of a kind that is not supported.
            MissingDependencyError: llama-cpp-python is not installed.
        """
        self._model: Any = None  # first: `__del__` asks for it, whatever fails below
        self.path = gguf_file(path)
        self._lib = engine()
        check_magic(self.path)
        params = self._lib.llama_model_default_params()
        params.vocab_only = True
        self._model = self._lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise ElmExportError(f"llama.cpp cannot load {self.path}: {reason()}. The file is damaged; copy it again or export it again")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        kind = self._lib.llama_vocab_type(self._vocab)
        if kind == _NONE:
            raise ElmExportError(f"{self.path} has no tokenizer inside; pass the model's with --tokenizer PATH")
        if kind not in (_SENTENCEPIECE, _BYTE_LEVEL, _UNIGRAM):
            raise ElmExportError(
                f"{self.path} holds a tokenizer of a kind ({self._meta('tokenizer.ggml.model')}) that is not supported; pass the model's with --tokenizer PATH"
            )
        self.vocab_size = self._lib.llama_vocab_n_tokens(self._vocab)
        self._strips = kind != _BYTE_LEVEL and self._meta("tokenizer.ggml.add_space_prefix", str(kind == _SENTENCEPIECE).lower()) == "true"
        self.special = self._special_ids()
        self.chat_template = self._meta("tokenizer.chat_template") or None

    def _special_ids(self) -> SpecialIds:
        lib, vocab = self._lib, self._vocab
        adds = bool(lib.llama_vocab_get_add_bos(vocab))
        # Where a file names none, llama.cpp assumes one.
        bos = _known(lib.llama_vocab_bos(vocab)) if adds or self._meta("tokenizer.ggml.bos_token_id") else None
        usual = (lib.llama_vocab_eos(vocab), lib.llama_vocab_eot(vocab))
        ends = [i for i in usual if i >= 0] + [i for i in range(self.vocab_size) if lib.llama_vocab_is_eog(vocab, i)]
        unknown = next((i for i, piece in enumerate(self._pieces) if piece.kind is PieceKind.UNKNOWN), None)
        return SpecialIds(bos, adds, tuple(dict.fromkeys(ends)), unknown, _known(lib.llama_vocab_pad(vocab)))

    def _meta(self, key: str, default: str = "") -> str:
        """A value of the file's metadata as text."""
        size = self._lib.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return default
        buffer = ctypes.create_string_buffer(size + 1)
        self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        data = text.encode("utf-8")
        room = 2 * len(data) + 2  # a token is a byte at least, but for BOS and the spaces before words
        ids = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, False, parse_special)
        return list(ids[:count])

    def pieces(self) -> list[Piece]:
        return list(self._pieces)

    @cached_property
    def _pieces(self) -> Sequence[Piece]:
        lib, vocab = self._lib, self._vocab
        return [
            Piece(
                lib.llama_vocab_get_text(vocab, i).decode("utf-8", "replace"),
                lib.llama_vocab_get_score(vocab, i),
                # A damaged file may say nothing of a token.
                next((kind for flag, kind in _KINDS if lib.llama_vocab_get_attr(vocab, i) & flag), PieceKind.UNUSED),
            )
            for i in range(self.vocab_size)
        ]

    def write(self, folder: Path) -> None:
        raise ElmExportError(f"{self.path} holds its tokenizer inside; there is no file of it to write")

    def _decode(self, ids: list[int]) -> str:
        # Token by token: the library's own function for texts also "cleans" spaces, before punctuation for example.
        data = b"".join(map(self._bytes, ids))
        return (data.removeprefix(b" ") if self._strips else data).decode("utf-8", "replace")

    def _bytes(self, token_id: int) -> bytes:
        size = -self._lib.llama_token_to_piece(self._vocab, token_id, None, 0, 0, False)  # negative: the bytes it would take
        buffer = ctypes.create_string_buffer(max(size, 1))
        size = self._lib.llama_token_to_piece(self._vocab, token_id, buffer, max(size, 0), 0, False)
        return buffer.raw[: max(size, 0)]

    def _content(self) -> str:
        keys = ("model", "pre", "add_space_prefix", "remove_extra_whitespaces")
        facts = [self._meta(f"tokenizer.ggml.{key}") for key in keys]
        # Merges cannot be asked for; what they do can.
        return hashlib.sha256(repr((facts, self._pieces, [self._encode(text, True) for text in PROBES])).encode()).hexdigest()

    def __del__(self) -> None:
        if self._model:
            self._lib.llama_model_free(self._model)


def _known(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
