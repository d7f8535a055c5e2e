"""A SentencePiece model, `tokenizer.model`, read by SentencePiece."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from elmexport.checkpoint.tokenizer.base import Piece, PieceKind, SpecialIds, Tokenizer
from elmexport.checkpoint.tokenizer.beside import Beside
from elmexport.checkpoint.tokenizer.huggingface import damaged

FILE_NAME = "tokenizer.model"
UNIGRAM, BPE = 1, 2  # the file's numbers of its kinds; the others are words and single characters


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` file; tokens that other files add are not SentencePiece's (`elmexport.checkpoint.tokenizer.load_tokenizer`)."""

    def __init__(self, path: Path, beside: Beside | None = None) -> None:
        """
        Raises:
            ElmExportError: damaged file.
        """
        import sentencepiece
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from sentencepiece import sentencepiece_model_pb2

        self.path = path
        beside = beside or Beside()
        try:
            # From bytes: given a path that it cannot parse, the library also writes to stderr.
            self._bytes = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._bytes)
            # What the processor does not tell: user-defined pieces, normalization.
            self.model: Any = sentencepiece_model_pb2.ModelProto()
            self.model.ParseFromString(self._bytes)
            self._pieces = tuple(Piece(_text(piece.piece), piece.score, PieceKind(piece.type)) for piece in self.model.pieces)
        except (RuntimeError, OSError, DecodeError, ValueError) as error:
            raise damaged(path, error) from None
        processor = self._processor
        self.vocab_size = processor.vocab_size()
        self.chat_template = beside.template

        def role(name: str, own: int) -> int | None:
            named = beside.tokens.get(name)
            found = own if named is None or processor.id_to_piece(processor.piece_to_id(named)) != named else processor.piece_to_id(named)
            return found if found >= 0 else None

        bos, eos = role("bos_token", processor.bos_id()), role("eos_token", processor.eos_id())
        adds = beside.add_bos if beside.add_bos is not None else bos is not None
        ends = () if eos is None else (eos,)
        self.special = SpecialIds(bos, adds and bos is not None, ends, processor.unk_id(), role("pad_token", processor.pad_id()))

    def pieces(self) -> list[Piece]:
        return list(self._pieces)

    def write(self, folder: Path) -> None:
        shutil.copyfile(self.path, folder / FILE_NAME)

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for segment in self._control_tokens(text) if parse_special else [text]:
            ids += [segment] if isinstance(segment, int) else self._processor.encode(segment)
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode([i for i in ids if i != self.special.unk])  # which it would show as " ⁇ "
        return text

    def _content(self) -> str:
        return hashlib.sha256(self._bytes).hexdigest()


def _text(piece: str | bytes) -> str:
    """The text of a piece. Protobuf gives bytes where a file holds something that is no UTF-8.

    Raises:
        UnicodeDecodeError: it is none.
    """
    return piece if isinstance(piece, str) else piece.decode("utf-8")
