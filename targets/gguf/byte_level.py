"""Byte-level BPE for llama.cpp (`gpt2`): which of its pre-tokenizers splits texts as the file's own does."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from elmexport.checkpoint.tokenizer.huggingface import JsonTokenizer
from elmexport.errors import ElmExportError
from targets.gguf.vocabulary import Vocabulary, refused, steps

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"

# By the patterns that cut a text, one after the other, whether a word that is a piece is taken as it is (ignore_merges), and whether characters are
# composed first (NFC, which llama.cpp never does: the names are those that its converter gives to such files).
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool, bool], str] = {
    ((GPT2,), False, False): "gpt-2",
    ((GPT2,), False, True): "olmo",
    ((DIGIT, GPT2), False, False): "smollm",
    ((DIGIT, GPT2), False, True): "command-r",
    ((LLAMA3,), True, False): "llama-bpe",
    ((LLAMA3,), True, True): "llama-bpe",
    ((LLAMA3,), False, False): "smaug-bpe",
    ((LLAMA3,), False, True): "smaug-bpe",
    ((QWEN2,), False, False): "qwen2",
    ((QWEN2,), False, True): "qwen2",
    ((QWEN35,), False, False): "qwen35",
    ((QWEN35,), False, True): "qwen35",
}
_COMPOSED = (
    "the tokenizer composes characters (NFC: e and an accent are one) before it looks for pieces, llama.cpp does not; texts that are composed already, "
    "as nearly all are, have the same ids"
)


def is_byte_level(tokenizer: JsonTokenizer) -> bool:
    """Whether bytes are what the vocabulary begins with."""
    return any(step["type"] == "ByteLevel" for step in steps(tokenizer.data.get("pre_tokenizer"), "pretokenizers"))


def byte_level(tokenizer: JsonTokenizer) -> Vocabulary:
    """The vocabulary of `tokenizer`, which is byte-level BPE.

    Raises:
        ElmExportError: a pre-tokenizer that llama.cpp lacks, or something else that it does otherwise.
    """
    model = tokenizer.model
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise refused(tokenizer, f"has a {key}")
    normalizers = [step["type"] for step in steps(tokenizer.data.get("normalizer"), "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise refused(tokenizer, f"normalizes texts ({', '.join(normalizers)})")
    patterns = tuple(_patterns(tokenizer))
    pre = PRE_TOKENIZERS.get((patterns, bool(model.get("ignore_merges")), bool(normalizers)))
    if pre is None:
        words = " then ".join(patterns) or "nothing but bytes"
        merges = "words that are pieces taken as they are (ignore_merges)" if model.get("ignore_merges") else "words built by merges"
        raise ElmExportError(
            f"{tokenizer.path} splits texts by {words}, with {merges}; none of llama.cpp's pre-tokenizers that elmexport knows does the same "
            f"({', '.join(dict.fromkeys(PRE_TOKENIZERS.values()))}). Export to onnx or coreml, or without a tokenizer (--tokenizer none)"
        )
    lacking = next((byte for byte in _bytes() if byte not in model["vocab"]), None)
    if lacking is not None:
        raise refused(tokenizer, f"has no piece for some bytes ({lacking!r})")
    notes = [_COMPOSED] if normalizers else []
    for token in tokenizer.added:
        if token.lstrip or token.rstrip or token.single_word:
            if not token.special:
                raise refused(
                    tokenizer, f"has an added token that takes the spaces around it ({token.content!r}), or stands for whole words only"
                )
            notes.append(f"llama.cpp leaves the spaces around the control token {token.content!r}, which the tokenizer takes away")
        if token.normalized and normalizers and unicodedata.normalize("NFC", token.content) != token.content:
            raise refused(tokenizer, f"has an added token that is composed of other characters than it is written with ({token.content!r})")
    joins = [f"{left} {right}" for left, right in tokenizer.merges()]
    return Vocabulary("gpt2", tokenizer.pieces(), pre, joins, notes=tuple(notes))


def _patterns(tokenizer: JsonTokenizer) -> Iterator[str]:
    """The regular expressions whose matches are cut out of a text, one step after the other."""
    for step in steps(tokenizer.data.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": True}:
                raise refused(tokenizer, "puts a space before a text's first word (add_prefix_space)")
            case {"type": "ByteLevel"}:
                if step.get("use_regex", True):
                    yield GPT2
            case {"type": "Digits", "individual_digits": True}:
                yield DIGIT
            case {"type": "Split", "pattern": {"Regex": str(pattern)}} if _keeps_matches(step):
                yield pattern
            case _:
                raise refused(tokenizer, f"splits texts in a way that llama.cpp does not ({_described(step)})")


def _keeps_matches(step: Mapping[str, Any]) -> bool:
    """Whether the matches are the parts, and the text between them too, where there is any."""
    return step.get("behavior") == "Isolated" or (step.get("behavior") == "Removed" and bool(step.get("invert")))


def _described(step: Mapping[str, Any]) -> str:
    return ", ".join([str(step["type"]), *(f"{key} {value!r}" for key, value in step.items() if key != "type")])


def _bytes() -> Iterator[str]:
    """The characters that stand for the bytes of texts in such vocabularies (GPT-2's `bytes_to_unicode`).

    Without control characters and the bytes that begin unassigned ones, which published vocabularies lack: both libraries drop them.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(0x100) if byte not in shown)
    stand_ins = {byte: chr(byte) for byte in shown} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    ordinary = {0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0xF1)} - {0xC0, 0xC1}
    yield from (stand_ins[byte] for byte in sorted(ordinary))
