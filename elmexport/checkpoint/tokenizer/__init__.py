"""Tokenizers: text to ids and back, from SentencePiece's `tokenizer.model` or Hugging Face's `tokenizer.json`.

`load_tokenizer` opens either. Where both lie side by side `tokenizer.json` counts: it is what other programs read, and it may hold tokens that
were added later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from elmexport.checkpoint.tokenizer.base import FIX, Piece, PieceKind, Span, SpecialIds, Tokenizer
from elmexport.checkpoint.tokenizer.beside import BESIDE, Beside, read_beside
from elmexport.checkpoint.tokenizer.stream import StreamDecoder
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the first found is used


@dataclass(frozen=True)
class ModelIds:
    """Ids that a model's configuration gives to the beginning and the ends of texts; they count, whatever a tokenizer's files say."""

    bos: int | None
    eos: tuple[int, ...]
    rows: int  # of the embedding

    @classmethod
    def of(cls, config: ModelConfig) -> ModelIds:
        return cls(config.bos_token_id, config.eos_token_ids, config.dims.vocab_size)


def load_tokenizer(path: Path, model: ModelIds | None = None) -> Tokenizer:
    """Open `path`, a `tokenizer.json`, or by any other name a SentencePiece model, with what the files beside it add.

    `model` is what the model says that the tokenizer is for.

    Raises:
        ElmExportError: no such file, a damaged one, one of another model, or added tokens that the file cannot take.
    """
    if not path.is_file():
        raise ElmExportError(f"{path}: no such tokenizer file; give a tokenizer.model or tokenizer.json")
    beside = read_beside(path.parent)
    tokenizer = _open(path, beside, model)
    if model is not None:
        _check_rows(tokenizer, model)
        tokenizer.special = _special_ids(tokenizer, beside, model)
    if not tokenizer.special.eos:
        raise ElmExportError(
            f"{path} has no token that ends a text, nor do the files beside it name one: put eos_token into a tokenizer_config.json beside it, "
            f"or eos_token_id into the model's config.json, or {FIX}"
        )
    return tokenizer


def _open(path: Path, beside: Beside, model: ModelIds | None) -> Tokenizer:
    from elmexport.checkpoint.tokenizer.huggingface import JsonTokenizer

    control = set() if model is None else {*model.eos, *(() if model.bos is None else (model.bos,))}
    if path.suffix == ".json":
        return JsonTokenizer(path, beside=beside, control=control)
    from elmexport.checkpoint.tokenizer.sentencepiece import SentencePieceTokenizer

    tokenizer = SentencePieceTokenizer(path, beside)
    own = {piece.text for piece in tokenizer.pieces()}
    if all(token.content in own for token in beside.added):
        return tokenizer
    from elmexport.checkpoint.tokenizer.convert import to_json

    return JsonTokenizer(path, to_json(tokenizer), beside, control)


def _check_rows(tokenizer: Tokenizer, model: ModelIds) -> None:
    """Fewer pieces than rows are allowed: embeddings are often padded."""
    if tokenizer.vocab_size <= model.rows:
        return
    beyond = [piece.text for piece in tokenizer.pieces()[model.rows :] if piece.kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED)]
    raise ElmExportError(
        f"{tokenizer.path} has {tokenizer.vocab_size} pieces, more than the {model.rows} rows of the model's embedding"
        + (f" (beyond them the added token {beyond[0]!r})" if beyond else "")
        + f"; {FIX}"
    )


def _special_ids(tokenizer: Tokenizer, beside: Beside, model: ModelIds) -> SpecialIds:
    """The ids of `tokenizer` as the model has them; which token ends a text, a tokenizer_config.json may add to.

    Raises:
        ElmExportError: ids that are no control tokens in this vocabulary, while it has others.
    """
    own = tokenizer.special
    control = {i for i, piece in enumerate(tokenizer.pieces()) if piece.kind is PieceKind.CONTROL}
    if model.bos is not None and own.bos not in (None, model.bos) and model.bos not in control:
        raise ElmExportError(f"{tokenizer.path} has BOS id {own.bos}, config.json says {model.bos}; {FIX}")
    if own.eos and model.eos and own.eos[0] not in model.eos and not control.intersection(model.eos):
        raise ElmExportError(f"{tokenizer.path} has EOS id {own.eos[0]}, config.json says {' and '.join(map(str, model.eos))}; {FIX}")
    beyond = [i for i in (*model.eos, *(() if model.bos is None else (model.bos,))) if i >= tokenizer.vocab_size]
    if beyond:
        raise ElmExportError(
            f"{tokenizer.path} has no token {beyond[0]}, which config.json names as one that begins or ends texts; where tokens were added to the "
            f"vocabulary, tokenizer.json, added_tokens.json or tokenizer_config.json must lie beside it. Else {FIX}"
        )
    named = own.eos if "eos_token" in beside.tokens or not model.eos else ()
    bos = model.bos
    if bos is None and (beside.add_bos or tokenizer.puts_bos):
        bos = own.bos
    adds = bos is not None if beside.add_bos is None else beside.add_bos and bos is not None
    return replace(own, bos=bos, adds_bos=adds, eos=tuple(dict.fromkeys((*model.eos, *named))))


__all__ = [
    "BESIDE",
    "TOKENIZER_FILES",
    "ModelIds",
    "Piece",
    "PieceKind",
    "Span",
    "SpecialIds",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
]
