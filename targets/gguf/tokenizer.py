"""The vocabulary as GGUF metadata: of the kind by which llama.cpp gives texts the same ids."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from elmexport.checkpoint.tokenizer import PieceKind, Tokenizer
from elmexport.checkpoint.tokenizer.added import CONTROL_NAMES
from elmexport.checkpoint.tokenizer.huggingface import JsonTokenizer
from elmexport.checkpoint.tokenizer.sentencepiece import UNIGRAM, SentencePieceTokenizer
from elmexport.errors import ElmExportError
from targets.gguf.byte_level import byte_level, is_byte_level
from targets.gguf.sentencepiece import bpe_of_json, bpe_of_sentencepiece, unigram_of_json, unigram_of_sentencepiece
from targets.gguf.vocabulary import Vocabulary, refused

if TYPE_CHECKING:
    from gguf import GGUFWriter

PADDING_SCORE = -10000.0
# What llama.cpp takes for text by their names, whatever a file says of them.
_FORCED_TEXT = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def write_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer | None, vocab_size: int, chat_template: str | None = None) -> None:
    """Add the vocabulary, padded with unused tokens to the `vocab_size` rows of the embedding; without a tokenizer, only their number.

    llama.cpp runs a file without a vocabulary on token ids alone.

    Raises:
        ElmExportError: two pieces alike, which llama.cpp cannot load, or see `find_vocabulary`.
    """
    if tokenizer is None:
        writer.add_vocab_size(vocab_size)
        writer.add_tokenizer_model("no_vocab")
        return
    found = find_vocabulary(tokenizer)
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    scores = [PADDING_SCORE] * vocab_size
    kinds = [PieceKind.UNUSED] * vocab_size
    for i, piece in enumerate(found.pieces):
        if piece.text:
            texts[i], scores[i], kinds[i] = piece.text, piece.score, piece.kind
    doubles = [text for text, count in Counter(texts).items() if count > 1]
    if doubles:
        raise ElmExportError(
            f"{tokenizer.path} holds the piece {doubles[0]!r} more than once; llama.cpp needs pieces that differ: "
            "use the tokenizer that the model was trained with (--tokenizer PATH)"
        )
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(texts)
    if not found.merges:
        writer.add_token_scores(scores)
    writer.add_token_types([kind.value for kind in kinds])
    if found.merges:
        writer.add_token_merges(found.merges)
    _write_special_ids(writer, tokenizer)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    if found.space_prefix is not None:
        writer.add_add_space_prefix(found.space_prefix)
    if found.removes_spaces is not None:
        writer.add_remove_extra_whitespaces(found.removes_spaces)
    if found.charsmap:
        writer.add_precompiled_charsmap(found.charsmap)


def find_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of `tokenizer` for llama.cpp.

    Raises:
        ElmExportError: llama.cpp has no tokenizer that gives the same ids.
    """
    try:
        found = _vocabulary(tokenizer)
    except (LookupError, TypeError, AttributeError) as error:  # its library takes forms of a part that none of its versions writes
        raise refused(tokenizer, f"has a part of an unknown form ({type(error).__name__}: {error})") from error
    forced = next((piece for piece in found.pieces if piece.kind is PieceKind.CONTROL and piece.text in _FORCED_TEXT), None)
    if forced is not None:
        raise refused(tokenizer, f"has the control token {forced.text!r}, which llama.cpp finds in every text")
    return found


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    if isinstance(tokenizer, SentencePieceTokenizer):
        unigram = tokenizer.model.trainer_spec.model_type == UNIGRAM
        return unigram_of_sentencepiece(tokenizer) if unigram else bpe_of_sentencepiece(tokenizer)
    if not isinstance(tokenizer, JsonTokenizer):
        raise refused(tokenizer, f"is of a kind ({type(tokenizer).__name__}) that GGUF has no form for")
    if tokenizer.model["type"] == "Unigram":
        return unigram_of_json(tokenizer)
    if tokenizer.model["type"] == "BPE":
        return byte_level(tokenizer) if is_byte_level(tokenizer) else bpe_of_json(tokenizer)
    raise refused(tokenizer, f"holds a {tokenizer.model['type']} vocabulary")


def ends(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that end a text as the file names them (end of text, of turn, of message), and those for which it has no place.

    llama.cpp knows more ends by their names.
    """
    pieces, (first, *others) = tokenizer.pieces(), tokenizer.special.eos
    unknown = sorted(others, key=lambda i: pieces[i].text in CONTROL_NAMES)  # those it knows by name come last
    named, left = unknown[:2], unknown[2:]
    return (first, *named), tuple(i for i in left if pieces[i].text not in CONTROL_NAMES)


def _write_special_ids(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    special = tokenizer.special
    named, _ = ends(tokenizer)
    if special.bos is not None:
        writer.add_bos_token_id(special.bos)
    for add, token_id in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), named, strict=False):
        add(token_id)
    if special.unk is not None:
        writer.add_unk_token_id(special.unk)
    if special.pad is not None:
        writer.add_pad_token_id(special.pad)
    writer.add_add_bos_token(special.adds_bos)
    writer.add_add_eos_token(False)
