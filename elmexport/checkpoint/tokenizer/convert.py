"""`tokenizer.json` from a SentencePiece model: for what gives the same ids there, and for nothing else.

What is different in principle: two unigram segmentations of the very same probability (the same pieces in another order, in runs of one
character). SentencePiece adds probabilities in float32 and lets the rounding decide; `tokenizers` adds them in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from elmexport.checkpoint.tokenizer.base import SPACE, Piece, PieceKind
from elmexport.checkpoint.tokenizer.sentencepiece import BPE, UNIGRAM, SentencePieceTokenizer
from elmexport.errors import ElmExportError

# Written so that JavaScript's, Python's and oniguruma's engines read them alike: no \A and \z.
OUTER_SPACES = r"(?<![\s\S]) +| +(?![\s\S])"
DOUBLE_SPACES = " {2,}"
UNLIKELY = 1e6  # nats


def to_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Make the tokenizer.json that gives the ids of `tokenizer`, in the form of Llama's own file, without a post-processor.

    Such a file lists BPE's merges where SentencePiece has scores: every way to split a piece into two others, in the order of the scores.

    Raises:
        ElmExportError: SentencePiece does something with these texts that a tokenizer.json has no form for.
    """
    import tokenizers
    from tokenizers import AddedToken, models

    reason = obstacle(tokenizer)
    if reason is not None:
        raise ElmExportError(
            f"{tokenizer.path} {reason}: no tokenizer.json gives the same ids, and the artifact's users would read one. Give a tokenizer.json that "
            "the model was trained with (--tokenizer PATH), or go without a tokenizer (--tokenizer none)"
        )
    pieces, unk = tokenizer.pieces(), tokenizer.special.unk
    assert unk is not None
    byte_fallback = bool(tokenizer.model.trainer_spec.byte_fallback)
    user: list[Piece] = []
    model: Any
    if tokenizer.model.trainer_spec.model_type == BPE:
        vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
        merges = list(_merges(pieces, vocabulary))
        model = models.BPE(vocabulary, merges, unk_token=pieces[unk].text, fuse_unk=True, byte_fallback=byte_fallback)
        user = [piece for piece in pieces if piece.kind is PieceKind.USER_DEFINED]
    else:
        # The library would find "<0x41>" spelled out in a text: no byte may be a likely piece.
        lowest = min((piece.score for piece in pieces if piece.kind is PieceKind.NORMAL), default=0.0) - UNLIKELY
        scored = [(piece.text, lowest if piece.kind is PieceKind.BYTE else piece.score) for piece in pieces]
        model = models.Unigram(scored, unk_id=unk, byte_fallback=byte_fallback)
    built = tokenizers.Tokenizer(model)
    control = [piece.text for piece in pieces if piece.kind in (PieceKind.UNKNOWN, PieceKind.CONTROL)]
    built.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    # SentencePiece finds them before anything else, in the text with its spaces replaced.
    built.add_tokens([AddedToken(piece.text, normalized=True, special=False) for piece in user])
    prefix, extra = dummy_prefix(tokenizer), removes_spaces(tokenizer)
    built.normalizer = _normalizer(prefix=prefix, extra=extra)
    built.decoder = _decoder(byte_fallback, strips=prefix or extra)
    data: dict[str, Any] = json.loads(built.to_str())
    return data


def obstacle(tokenizer: SentencePieceTokenizer) -> str | None:
    """Find the reason why no tokenizer.json gives the ids of `tokenizer`; None where one does.

    It ends a sentence that begins with the file's name.
    """
    trainer, normalizer, pieces = tokenizer.model.trainer_spec, tokenizer.model.normalizer_spec, tokenizer.pieces()
    user = [piece for piece in pieces if piece.kind is PieceKind.USER_DEFINED]
    unused = next((piece for piece in pieces if piece.kind is PieceKind.UNUSED), None)
    if trainer.model_type not in (BPE, UNIGRAM):
        return "holds whole words or single characters, neither BPE nor unigram"
    if normalizer.precompiled_charsmap:
        return f"normalizes texts by SentencePiece's own table ({normalizer.name or 'unnamed'}), by longest match"
    if trainer.treat_whitespace_as_suffix:
        return "puts spaces at the end of words (treat_whitespace_as_suffix)"
    if not normalizer.escape_whitespaces:
        return "keeps spaces as they are (escape_whitespaces is false)"
    if unused is not None:
        return f"has pieces that are marked as unused ({unused.text!r})"
    characters = {piece.text for piece in pieces if piece.kind is PieceKind.NORMAL and len(piece.text) == 1}
    lacking = sorted({character for piece in pieces if piece.kind is PieceKind.NORMAL for character in piece.text} - characters)
    if lacking and trainer.model_type == BPE:
        return f"has pieces with the character {lacking[0]!r}, which is no piece itself"
    if user and trainer.model_type == UNIGRAM:
        return f"is a unigram vocabulary with user-defined pieces ({user[0].text!r}), which SentencePiece weighs by rules of its own"
    if user and normalizer.add_dummy_prefix:
        return f"has user-defined pieces ({user[0].text!r}), after which other tokenizers put the space anew that it puts before a text's first word"
    if user and normalizer.remove_extra_whitespaces:
        return f"has user-defined pieces ({user[0].text!r}), whose spaces it keeps while it removes others"
    if trainer.model_type == UNIGRAM and trainer.byte_fallback:
        spelled = sorted(
            {*lacking, *(character for piece in pieces if piece.kind is PieceKind.BYTE for character in piece.text)} - characters
        )
        if spelled:
            return f"has no piece for the character {spelled[0]!r}, without which a byte spelled out (<0x41>) cannot be told from a byte"
    return None


def dummy_prefix(tokenizer: SentencePieceTokenizer) -> bool:
    """Whether a space is put before a text's first word."""
    return bool(tokenizer.model.normalizer_spec.add_dummy_prefix)


def removes_spaces(tokenizer: SentencePieceTokenizer) -> bool:
    """Whether spaces around a text, and all but one of those inside, are taken away."""
    return bool(tokenizer.model.normalizer_spec.remove_extra_whitespaces)


def _merges(pieces: list[Piece], vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    for piece in sorted((piece for piece in pieces if piece.kind is PieceKind.NORMAL), key=lambda piece: -piece.score):
        cuts = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
        known = (cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary)
        yield from sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))


def _normalizer(*, prefix: bool, extra: bool) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Replace(Regex(OUTER_SPACES), ""), normalizers.Replace(Regex(DOUBLE_SPACES), " ")] if extra else []
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def unigram_normalizer(*, prefix: bool, extra: bool) -> dict[str, Any]:
    """The normalizer in the files that `to_json` makes, as JSON."""
    data: dict[str, Any] = json.loads(_normalizer(prefix=prefix, extra=extra).__getstate__())
    return data


def _decoder(byte_fallback: bool, *, strips: bool) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), *([decoders.ByteFallback()] if byte_fallback else []), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
