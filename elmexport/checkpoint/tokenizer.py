"""Tokenizers: one `Tokenizer` over SentencePiece's `tokenizer.model` and Hugging Face's `tokenizer.json`.

Both give the same ids for the same text. Special tokens spelled out in a text ("</s>") are plain text, never control tokens. Not covered:
chat templates and vocabularies of other kinds than SentencePiece's BPE with byte fallback.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # the first found is used
UNREACHABLE_SCORE = -1e9  # below every merge's: what Llama's own vocabulary gives to pieces that must not be merged into
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd"


class PieceKind(Enum):
    """SentencePiece's kinds, with the numbers that its model file and GGUF use."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; `text` has U+2581 for a space, `score` is the merge priority (higher merges first)."""

    text: str
    score: float
    kind: PieceKind


class Tokenizer(ABC):
    """Text to ids and back."""

    path: Path  # the file, to copy into artifacts
    file_name: str  # what it is called there, whatever it was called
    vocab_size: int  # number of pieces, at most the rows of the embedding
    bos_id: int
    eos_id: int
    unk_id: int

    @abstractmethod
    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of `text`, after BOS unless told otherwise."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: control tokens and ids beyond the vocabulary (padding rows of the embedding) give nothing.

        The space that SentencePiece puts before a text's first word is taken off again.
        """
        return self._decode([i for i in ids if 0 <= i < self.vocab_size])

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The vocabulary by id."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` file."""

    file_name = "tokenizer.model"

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ElmExportError: damaged file, or a vocabulary without BOS, EOS or unknown token.
        """
        import sentencepiece

        self.path = path
        try:
            # From bytes: given a path that it cannot parse, the library also writes to stderr.
            self._proto = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        except (RuntimeError, OSError) as error:
            raise _damaged(path, error) from None
        processor = self._processor
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id, self.unk_id = processor.bos_id(), processor.eos_id(), processor.unk_id()
        for label, token_id in (("BOS", self.bos_id), ("EOS", self.eos_id), ("unknown", self.unk_id)):
            if token_id < 0:
                raise ElmExportError(
                    f"{path} has no {label} token, and one is needed; use the tokenizer that the model was trained with (--tokenizer PATH)"
                )

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return [self.bos_id, *ids] if bos else ids

    def pieces(self) -> list[Piece]:
        # The processor does not tell user-defined pieces from normal ones; the file does.
        from sentencepiece import sentencepiece_model_pb2

        model: Any = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(self._proto)
        return [Piece(piece.piece, piece.score, PieceKind(piece.type)) for piece in model.pieces]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` file that holds a SentencePiece BPE vocabulary, as Llama's does."""

    file_name = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ElmExportError: damaged file, or a vocabulary of another kind.
        """
        import tokenizers

        self.path = path
        try:
            self._data = json.loads(path.read_text(encoding="utf-8"))
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise _damaged(path, error) from None
        model = self._data["model"]
        if model.get("type") != "BPE" or not model.get("byte_fallback"):
            raise ElmExportError(
                f"{path} holds a {model.get('type')} vocabulary{'' if model.get('byte_fallback') else ' without byte fallback'}; "
                "only SentencePiece BPE with byte fallback is supported: use the tokenizer that the model was trained with (--tokenizer PATH)"
            )
        self._tokenizer.encode_special_tokens = True  # "</s>" typed by a user is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id = self._id("<s>", "BOS"), self._id("</s>", "EOS")
        self.unk_id = self._id(model.get("unk_token") or "<unk>", "unknown")

    def _id(self, text: str, label: str) -> int:
        token_id = self._tokenizer.token_to_id(text)
        if token_id is None:
            raise ElmExportError(
                f"{self.path} has no {label} token {text!r}, and one is needed; use the tokenizer that the model was trained with (--tokenizer PATH)"
            )
        return int(token_id)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos else ids

    def pieces(self) -> list[Piece]:
        """The vocabulary with SentencePiece scores, which the file does not hold.

        A merge's rank is the order of its result's score, so a piece gets minus its place among the results; single characters, which
        nothing is merged into, follow. That restores the order of the original scores, which is all that tokenizing looks at.
        """
        merges = (merge if isinstance(merge, list) else merge.split(" ", 1) for merge in self._data["model"]["merges"])
        results = dict.fromkeys(left + right for left, right in merges)
        special = {token["id"]: bool(token.get("special")) for token in self._data.get("added_tokens", ())}
        texts = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        kinds = [self._kind(i, text, special) for i, text in enumerate(texts)]
        normal = {text for text, kind in zip(texts, kinds, strict=True) if kind is PieceKind.NORMAL}
        ranked = [text for text in results if text in normal]
        ranked += [text for text in texts if text in normal and text not in results and len(text) == 1]
        scores = {text: -float(rank) for rank, text in enumerate(ranked)}
        return [
            Piece(text, scores.get(text, UNREACHABLE_SCORE) if kind is PieceKind.NORMAL else 0.0, kind)
            for text, kind in zip(texts, kinds, strict=True)
        ]

    def _kind(self, token_id: int, text: str, special: dict[int, bool]) -> PieceKind:
        if token_id == self.unk_id:
            return PieceKind.UNKNOWN
        if token_id in special:
            return PieceKind.CONTROL if special[token_id] else PieceKind.USER_DEFINED
        if _BYTE.fullmatch(text):
            return PieceKind.BYTE
        return PieceKind.NORMAL if text else PieceKind.UNUSED

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StreamDecoder:
    """Text of tokens that arrive one at a time: nothing is given out before its character is complete.

    `prompt` is what the text continues, so that a first word keeps its space. The parts, and `finish()`, add up to the text that
    `Tokenizer.decode` adds to the prompt's.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Decoding starts at a token whose text is out already, so that spaces fall as they do in the whole text.
        self._window = list(prompt)
        self._shown = tokenizer.decode(self._window)
        self._pending = len(self._window)  # where in the window the tokens begin whose text is not out yet

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""  # an unfinished character
        new = text[len(self._shown) :]
        self._shown = text
        if new:
            # The window shrinks to the tokens just given out: whole characters, so it never starts in the middle of one.
            self._window = self._window[self._pending :]
            self._shown = self._tokenizer.decode(self._window)
            self._pending = len(self._window)
        return new

    def finish(self) -> str:
        """What is left when no token follows: replacement characters for bytes that never made one."""
        text = self._tokenizer.decode(self._window)[len(self._shown) :]
        self._shown += text
        return text


def load_tokenizer(path: Path) -> Tokenizer:
    """Open `path`: `tokenizer.json`, or any other name for a SentencePiece model.

    Raises:
        ElmExportError: no such file, a damaged one, or a vocabulary of another kind.
    """
    if not path.is_file():
        raise ElmExportError(f"{path}: no such tokenizer file; give a tokenizer.model or tokenizer.json")
    return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse a tokenizer that belongs to another model. Fewer pieces than `vocab_size` are allowed: embeddings are often padded.

    Raises:
        ElmExportError: more pieces than the embedding has rows, or other BOS or EOS ids than the configuration's.
    """
    fix = "use the tokenizer that the model was trained with (--tokenizer PATH)"
    if tokenizer.vocab_size > config.dims.vocab_size:
        raise ElmExportError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, more than the {config.dims.vocab_size} rows of the model's embedding; {fix}"
        )
    for label, found, wanted in (("BOS", tokenizer.bos_id, config.bos_token_id), ("EOS", tokenizer.eos_id, config.eos_token_id)):
        if found != wanted:
            raise ElmExportError(f"{tokenizer.path} has {label} id {found}, config.json says {wanted}; {fix}")


def _damaged(path: Path, error: Exception) -> ElmExportError:
    kind = "tokenizers" if path.suffix == ".json" else "SentencePiece"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ElmExportError(f"{path} is not a {kind} file, or is damaged ({reason}); download it again")
