"""SentencePiece's vocabularies for llama.cpp: BPE (`llama`) and unigram (`t5`), where it gives the same ids.

llama.cpp's own rules, of which each case here is a consequence (llama-vocab.cpp): BPE takes no normalization, byte fallback is not optional, a
space is put before a text and after every token that was found in it as a whole; unigram has no byte fallback, and a text of spaces alone is
left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from elmexport.checkpoint.tokenizer import Piece, PieceKind, Tokenizer
from elmexport.checkpoint.tokenizer.base import SPACE
from elmexport.checkpoint.tokenizer.convert import dummy_prefix, obstacle, removes_spaces, unigram_normalizer
from elmexport.checkpoint.tokenizer.huggingface import JsonTokenizer
from elmexport.checkpoint.tokenizer.sentencepiece import SentencePieceTokenizer
from targets.gguf.vocabulary import Vocabulary, refused, steps


def bpe_of_sentencepiece(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    """Describe a SentencePiece BPE model for llama.cpp.

    Raises:
        ElmExportError: llama.cpp would give other ids.
    """
    reason = obstacle(tokenizer)
    if reason is not None:
        raise refused(tokenizer, reason)
    if removes_spaces(tokenizer):
        raise refused(tokenizer, "takes away extra spaces (remove_extra_whitespaces)")
    prefix = dummy_prefix(tokenizer)
    return Vocabulary("llama", _checked(tokenizer, tokenizer.pieces()), space_prefix=None if prefix else False)


def bpe_of_json(tokenizer: JsonTokenizer) -> Vocabulary:
    """Describe a tokenizer.json of SentencePiece's kind of BPE for llama.cpp.

    Raises:
        ElmExportError: llama.cpp would give other ids.
    """
    model, notes = tokenizer.model, []
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise refused(tokenizer, f"has a {key}")
    scheme, pattern = _space_scheme(tokenizer)
    user = [token for token in tokenizer.added if not token.special]
    if user and scheme == "first":
        raise refused(tokenizer, f"puts no space after the added token {user[0].content!r}")
    for token in tokenizer.added:
        if token.lstrip or token.rstrip or token.single_word:
            if not token.special:
                raise refused(
                    tokenizer, f"has an added token that takes the spaces around it ({token.content!r}), or stands for whole words only"
                )
            notes.append(f"llama.cpp leaves the spaces around the control token {token.content!r}, which the tokenizer takes away")
        elif not token.special and token.normalized and scheme == "prepend":
            raise refused(tokenizer, f"finds the added token {token.content!r} only after a space, because it is normalized")
    _check_merges(tokenizer, pattern)
    if scheme in ("always", "first"):
        notes.append("of a text that begins with a space, llama.cpp puts another one before it, and the tokenizer does not")
    if scheme == "first" and tokenizer.chat_template is not None:
        notes.append("in a chat, llama.cpp puts a space after every control token, and the tokenizer does not")
    return Vocabulary(
        "llama", _checked(tokenizer, tokenizer.pieces()), space_prefix=False if scheme == "never" else None, notes=tuple(notes)
    )


def _space_scheme(tokenizer: JsonTokenizer) -> tuple[str, bool]:
    """Where the file puts a space that is not in the text, and whether words are split before the merges.

    "prepend": before every text, and what follows an added token; "always": there, unless one is there; "first": before a text, unless one is
    there; "never".
    """
    scheme, replaced, splits = "never", False, False
    for step in steps(tokenizer.data.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step.get("prepend") == SPACE and not replaced:
            scheme = "prepend"
        elif step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            replaced = True
        else:
            raise refused(tokenizer, f"normalizes texts ({step['type']})")
    for step in steps(tokenizer.data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split" and step.get("pattern") == {"String": " "} and replaced:
            continue  # there are none any more
        if step["type"] != "Metaspace" or replaced or step.get("replacement") != SPACE:
            raise refused(tokenizer, f"splits texts in a way that SentencePiece does not ({step['type']})")
        replaced, splits = True, step.get("split", True)
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
    if not replaced:
        raise refused(tokenizer, "is neither SentencePiece's kind of BPE (spaces as U+2581) nor the byte-level kind")
    return scheme, splits


def _check_merges(tokenizer: JsonTokenizer, splits: bool) -> None:
    """llama.cpp joins any two pieces that make a third, the one of the highest score first: the file's merges must be all of these, in such an order."""
    merges = tokenizer.merges()
    normal = {piece.text for piece in tokenizer.pieces() if piece.kind is PieceKind.NORMAL}
    inner = next((text for text in normal if SPACE in text[1:]), None)
    if splits and inner is not None:
        raise refused(tokenizer, f"splits words before it joins pieces, and yet has the piece {inner!r}")
    wanted = {(text[:cut], text[cut:]) for text in normal for cut in range(1, len(text)) if text[:cut] in normal and text[cut:] in normal}
    lacking = wanted.difference(merges)
    if lacking:
        left, right = min(lacking)
        raise refused(
            tokenizer,
            f"does not join {left!r} and {right!r} though it has the piece {left + right!r}; it was not made from a SentencePiece model",
        )
    results = [left + right for left, right in merges]
    runs = [result for result, following in pairwise([*results, ""]) if result != following]
    if len(runs) != len(set(runs)):
        raise refused(tokenizer, "joins the same piece from different parts at different ranks; it was not made from a SentencePiece model")


def unigram_of_sentencepiece(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    """Describe a SentencePiece unigram model for llama.cpp.

    Raises:
        ElmExportError: llama.cpp would give other ids.
    """
    trainer, normalizer = tokenizer.model.trainer_spec, tokenizer.model.normalizer_spec
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise refused(tokenizer, "puts spaces at the end of words, or keeps them as they are")
    charsmap = bytes(normalizer.precompiled_charsmap)
    return _unigram(tokenizer, dummy_prefix(tokenizer), removes_spaces(tokenizer), bool(trainer.byte_fallback), charsmap)


def unigram_of_json(tokenizer: JsonTokenizer) -> Vocabulary:
    """Describe a tokenizer.json with a unigram vocabulary for llama.cpp.

    Raises:
        ElmExportError: llama.cpp would give other ids.
    """
    for prefix in (True, False):
        for extra in (True, False):
            if tokenizer.data.get("normalizer") == unigram_normalizer(prefix=prefix, extra=extra) and not tokenizer.data.get(
                "pre_tokenizer"
            ):
                return _unigram(tokenizer, prefix, extra, bool(tokenizer.model.get("byte_fallback")), b"")
    raise refused(
        tokenizer,
        "normalizes or splits texts in a way that llama.cpp's unigram tokenizer does not; give the tokenizer.model that it was made from",
    )


def _unigram(tokenizer: Tokenizer, prefix: bool, extra: bool, byte_fallback: bool, charsmap: bytes) -> Vocabulary:
    pieces = tokenizer.pieces()
    odd = next((piece for piece in pieces if piece.kind in (PieceKind.USER_DEFINED, PieceKind.UNUSED) and piece.text), None)
    if byte_fallback:
        raise refused(tokenizer, "is a unigram vocabulary with byte fallback")
    if odd is not None:
        raise refused(tokenizer, f"is a unigram vocabulary with user-defined or unused pieces ({odd.text!r})")
    if prefix != extra:
        words = "puts a space before texts but keeps extra ones" if prefix else "takes away extra spaces but puts none before texts"
        raise refused(tokenizer, f"is a unigram vocabulary that {words}")
    return Vocabulary("t5", pieces, space_prefix=prefix, removes_spaces=extra, charsmap=charsmap)


def _checked(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of llama.cpp's `llama` kind, which knows a user-defined piece by what stands in the text: a space.

    Raises:
        ElmExportError: without a piece for every byte it cannot run; or it would take a text for a token that is none.
    """
    texts = {piece.text for piece in pieces}
    if not all(f"<0x{byte:02X}>" in texts for byte in range(256)):
        raise refused(tokenizer, "has no byte fallback")
    normal = {piece.text for piece in pieces if piece.kind is PieceKind.NORMAL}

    def occurs(part: str) -> bool:
        return len(part) == 1 or part in normal

    for piece in pieces:
        if piece.kind not in (PieceKind.NORMAL, PieceKind.USER_DEFINED) and any(
            occurs(piece.text[:cut]) and occurs(piece.text[cut:]) for cut in range(1, len(piece.text))
        ):
            raise refused(tokenizer, f"has pieces of which {piece.text!r} could be joined, a token that no text has")
    return [
        Piece(piece.text.replace(SPACE, " "), piece.score, piece.kind) if piece.kind is PieceKind.USER_DEFINED else piece
        for piece in pieces
    ]
