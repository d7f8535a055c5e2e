"""`tokenizer.json` from a SentencePiece vocabulary, in the form that Llama's own file has, and `tokenizer_config.json` beside it: what
onnxruntime-genai, transformers.js and swift-transformers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elmexport.checkpoint.tokenizer import PieceKind, Tokenizer

_SPACE = "\u2581"


def write_tokenizer_files(tokenizer: Tokenizer, context: int, folder: Path) -> None:
    """Write `tokenizer_config.json` into `folder`, and `tokenizer.json` unless it is there. `context` is the most tokens that a text may have."""
    if not (folder / "tokenizer.json").exists():
        write_tokenizer_json(tokenizer, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(tokenizer, context), indent=2) + "\n", encoding="utf-8")


def write_tokenizer_json(tokenizer: Tokenizer, path: Path) -> None:
    """Write the vocabulary of `tokenizer` as `tokenizer.json`; its library gives the same ids, BOS first, and the same text back.

    Such a file lists merges where SentencePiece has scores: every way to split a piece into two others, in the order of the scores.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, processors

    pieces = tokenizer.pieces()
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for piece in sorted((piece for piece in pieces if piece.kind is PieceKind.NORMAL), key=lambda piece: -piece.score):
        cuts = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
        known = (cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary)
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    unknown, bos = pieces[tokenizer.unk_id].text, pieces[tokenizer.bos_id].text
    built = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    control = [piece.text for piece in pieces if piece.kind in (PieceKind.UNKNOWN, PieceKind.CONTROL)]
    built.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    user = [piece.text for piece in pieces if piece.kind is PieceKind.USER_DEFINED]
    built.add_tokens([AddedToken(text, normalized=False, special=False) for text in user])
    built.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    built.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    built.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
    )
    built.save(str(path))


def _config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    pieces = tokenizer.pieces()
    eos = pieces[tokenizer.eos_id].text
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,  # the text as it is, a space put before it: what SentencePiece does
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": pieces[tokenizer.bos_id].text,
        "eos_token": eos,
        "unk_token": pieces[tokenizer.unk_id].text,
        "pad_token": eos,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
