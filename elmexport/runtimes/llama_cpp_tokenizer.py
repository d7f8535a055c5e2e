"""Tokenizer of a GGUF file: the vocabulary inside it, run by llama.cpp itself."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from elmexport.checkpoint.tokenizer import Piece, PieceKind, Tokenizer
from elmexport.errors import ElmExportError
from elmexport.runtimes.llama_cpp import check_magic, engine, gguf_file, reason

# llama.cpp's types of a vocabulary: one that holds nothing, and SentencePiece's, which is Llama's
_NO_VOCABULARY, _SENTENCEPIECE = 0, 1
_KINDS = {  # by llama.cpp's flags of a token; GGUF files store SentencePiece's kinds
    1: PieceKind.UNKNOWN,
    2: PieceKind.UNUSED,
    4: PieceKind.NORMAL,
    8: PieceKind.CONTROL,
    16: PieceKind.USER_DEFINED,
    32: PieceKind.BYTE,
}


class LlamaCppTokenizer(Tokenizer):
    """Reads the vocabulary of `path`, an artifact folder or a `.gguf`, and none of its weights."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ElmExportError: llama.cpp cannot load the file, or it holds no vocabulary, or one of another kind than Llama's.
            MissingDependencyError: llama-cpp-python is not installed.
        """
        self._model: Any = None
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
        if kind == _NO_VOCABULARY:
            raise ElmExportError(f"{self.path} has no tokenizer inside; pass the model's with --tokenizer PATH")
        if kind != _SENTENCEPIECE:
            raise ElmExportError(f"{self.path} holds a tokenizer of another kind than Llama's, the only one supported")
        self.vocab_size = self._lib.llama_vocab_n_tokens(self._vocab)
        self.bos_id, self.eos_id = self._lib.llama_vocab_bos(self._vocab), self._lib.llama_vocab_eos(self._vocab)
        kinds = [piece.kind for piece in self.pieces()]
        self.unk_id = kinds.index(PieceKind.UNKNOWN)
        self._control = {i for i, kind in enumerate(kinds) if kind is PieceKind.CONTROL}

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        data = text.encode("utf-8")
        room = len(data) + 2  # a token is a byte at least, but for BOS and the space before the first word
        ids = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, bos, False)
        return list(ids[:count])

    def pieces(self) -> list[Piece]:
        lib, vocab = self._lib, self._vocab
        return [
            Piece(
                lib.llama_vocab_get_text(vocab, i).decode("utf-8"),
                lib.llama_vocab_get_score(vocab, i),
                _KINDS[lib.llama_vocab_get_attr(vocab, i)],
            )
            for i in range(self.vocab_size)
        ]

    def _decode(self, ids: list[int]) -> str:
        ids = [i for i in ids if i not in self._control]  # else the space after BOS counts as one of the text's
        tokens = (self._lib.llama_token * len(ids))(*ids)
        size = -self._lib.llama_detokenize(self._vocab, tokens, len(ids), None, 0, False, False)  # negative: the bytes it would take
        buffer = ctypes.create_string_buffer(max(size, 1))
        size = self._lib.llama_detokenize(self._vocab, tokens, len(ids), buffer, size, False, False)
        return buffer.raw[:size].decode("utf-8", "replace")

    def __del__(self) -> None:
        if self._model:
            self._lib.llama_model_free(self._model)
