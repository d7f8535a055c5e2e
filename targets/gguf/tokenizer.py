"""The vocabulary as GGUF metadata, of the kind that llama.cpp calls `llama`: SentencePiece BPE with byte fallback.

Not covered, because llama.cpp's tokenizer has no such thing: SentencePiece's text normalization and removal of extra spaces (Llama's
vocabulary uses neither).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from elmexport.checkpoint.tokenizer import PieceKind, Tokenizer
from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

PADDING_SCORE = -10000.0


def write_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer | None, vocab_size: int, chat_template: str | None = None) -> None:
    """Add the vocabulary, padded with unused tokens to the `vocab_size` rows of the embedding; without a tokenizer, only their number.

    llama.cpp runs a file without a vocabulary on token ids alone.

    Raises:
        ElmExportError: two pieces alike, which llama.cpp cannot load.
    """
    if tokenizer is None:
        writer.add_vocab_size(vocab_size)
        writer.add_tokenizer_model("no_vocab")
        return
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    scores = [PADDING_SCORE] * vocab_size
    kinds = [PieceKind.UNUSED] * vocab_size
    for i, piece in enumerate(tokenizer.pieces()):
        if piece.text:
            texts[i], scores[i], kinds[i] = piece.text, piece.score, piece.kind
    doubles = [text for text, count in Counter(texts).items() if count > 1]
    if doubles:
        raise ElmExportError(
            f"{tokenizer.path} holds the piece {doubles[0]!r} more than once; llama.cpp needs pieces that differ: "
            "use the tokenizer that the model was trained with (--tokenizer PATH)"
        )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types([kind.value for kind in kinds])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    if not _adds_space(tokenizer, texts):  # the default is to add one, and is not written
        writer.add_add_space_prefix(False)


def _adds_space(tokenizer: Tokenizer, texts: list[str]) -> bool:
    """Whether a text's first word is tokenized as if a space stood before it."""
    return texts[tokenizer.encode("a", bos=False)[0]].startswith("\u2581")
