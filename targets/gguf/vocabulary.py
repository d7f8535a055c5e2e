"""A vocabulary in a GGUF file: the pieces, and llama.cpp's tokenizer for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elmexport.checkpoint.tokenizer import Piece, Tokenizer
from elmexport.errors import ElmExportError


@dataclass(frozen=True)
class Vocabulary:
    """The `tokenizer.ggml.*` keys that say how a text is split."""

    model: str
    pieces: Sequence[Piece]
    pre: str = "default"
    merges: Sequence[str] = ()  # "left right"
    space_prefix: bool | None = None  # None: llama.cpp's default for the model
    removes_spaces: bool | None = None
    charsmap: bytes = b""
    notes: tuple[str, ...] = ()


def refused(tokenizer: Tokenizer, reason: str) -> ElmExportError:
    """Make the error of a tokenizer whose ids llama.cpp does not give; `reason` follows the file's name."""
    return ElmExportError(
        f"{tokenizer.path} {reason}: llama.cpp would give texts other ids. Export to onnx or coreml, or without a tokenizer (--tokenizer none)"
    )


def steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a tokenizer.json's part, sequences unrolled."""
    if not part:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in steps(inner, key)]
    return [part]
