"""The contract of a tokenizer: text to ids and back, and the ids that begin and end texts."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

SPACE = "\u2581"  # SentencePiece's sign for a space
FIX = "use the tokenizer that the model was trained with (--tokenizer PATH)"


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
    """One vocabulary entry.

    `text` is as the file has it: U+2581 for a space in SentencePiece's vocabularies, byte-level BPE's stand-ins for bytes. `score` is the
    merge priority (higher merges first), in unigram vocabularies the log-probability; 0 where there is none.
    """

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SpecialIds:
    """The ids that a vocabulary has beside those of text."""

    bos: int | None
    adds_bos: bool  # whether every text begins with `bos`
    eos: tuple[int, ...]  # the ids that end a text, the usual one first
    unk: int | None = None
    pad: int | None = None

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids that every text begins with."""
        return () if self.bos is None or not self.adds_bos else (self.bos,)


@dataclass(frozen=True)
class Span:
    """A part of a chat prompt: `markup` may hold control tokens spelled out; other text is only text, whatever it spells."""

    text: str
    markup: bool


class Tokenizer(ABC):
    """Text to ids and back."""

    path: Path  # the file it was read from
    vocab_size: int  # the highest id plus 1, at most the rows of the embedding
    special: SpecialIds
    chat_template: str | None = None  # Jinja2
    puts_bos: bool = False  # whether the file itself says that every text begins with BOS

    @property
    def bos_id(self) -> int | None:
        return self.special.bos

    @property
    def eos_id(self) -> int:
        return self.special.eos[0]

    def encode(self, text: str, *, bos: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`, after BOS where the model has one, unless told otherwise.

        Control tokens spelled out in a text ("</s>") are plain text unless `parse_special`. Tokens that were added to the vocabulary and are
        no control tokens are found in either case.
        """
        ids = self._encode(text, parse_special)
        return [*self.special.prefix, *ids] if bos else ids

    def encode_spans(self, spans: Sequence[Span]) -> list[int]:
        """Ids of the spans' texts, one after the other, as one text; no BOS is put before it."""
        segments: list[int | str] = []  # ids, and the text between them
        for span in spans:
            for segment in self._control_tokens(span.text) if span.markup else [span.text]:
                if isinstance(segment, str) and segments and isinstance(segments[-1], str):
                    segments[-1] += segment
                else:
                    segments.append(segment)
        ids: list[int] = []
        for segment in segments:
            ids += [segment] if isinstance(segment, int) else self._encode(segment, False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: control tokens and ids beyond the vocabulary (padding rows of the embedding) give nothing.

        The space that SentencePiece puts before a text's first word is taken off again.
        """
        return self._decode([i for i in ids if 0 <= i < self.vocab_size])

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The vocabulary by id; ids that stand for nothing have no text and the kind UNUSED."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) over everything that decides which ids a text has, and where it ends."""
        return hashlib.sha256(f"{self._content()} {self.special}".encode()).hexdigest()

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the tokenizer's own file into `folder`.

        Raises:
            ElmExportError: the tokenizer has no file of its own.
        """

    @abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def _content(self) -> str:
        """A hash of the vocabulary and its rules."""

    def _control_tokens(self, text: str) -> list[int | str]:
        """`text` cut at the control tokens spelled out in it: their ids, and the text between."""
        segments: list[int | str] = [text] if text else []
        by_length = sorted(
            ((piece.text, i) for i, piece in enumerate(self.pieces()) if piece.kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)),
            key=lambda item: -len(item[0]),
        )
        for content, token_id in by_length:
            if content in text:
                segments = [part for segment in segments for part in _cut(segment, content, token_id)]
        return segments


def _cut(segment: int | str, content: str, token_id: int) -> list[int | str]:
    if isinstance(segment, int):
        return [segment]
    parts: list[int | str] = []
    for i, text in enumerate(segment.split(content)):
        if i:
            parts.append(token_id)
        if text:
            parts.append(text)
    return parts
