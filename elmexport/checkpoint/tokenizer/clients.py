"""`tokenizer.json` and `tokenizer_config.json` for other programs.

onnxruntime-genai, transformers.js, swift-transformers and transformers read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from elmexport.checkpoint.tokenizer.base import SpecialIds, Tokenizer
from elmexport.checkpoint.tokenizer.beside import CONFIG
from elmexport.checkpoint.tokenizer.convert import OUTER_SPACES, to_json
from elmexport.checkpoint.tokenizer.huggingface import FILE_NAME, JsonTokenizer
from elmexport.checkpoint.tokenizer.probes import compare
from elmexport.checkpoint.tokenizer.sentencepiece import UNIGRAM, SentencePieceTokenizer

# Programs that know a tokenizer's class by name build what it stands for: transformers 5 makes another tokenizer of "LlamaTokenizer" than the
# file says. This one they take from the file.
CLASS = "PreTrainedTokenizerFast"


def client_json(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """The tokenizer.json of `tokenizer`: its ids, BOS first where the model has one, nothing cut off, and nothing behind.

    Raises:
        ElmExportError: no such file gives the same ids.
    """
    return _client_json(tokenizer, tokenizer.special)


@lru_cache(maxsize=1)  # an export asks when it begins and when it writes
def _client_json(tokenizer: Tokenizer, special: SpecialIds) -> Mapping[str, Any]:
    if isinstance(tokenizer, SentencePieceTokenizer):
        made = JsonTokenizer(tokenizer.path, to_json(tokenizer))
        made.special = special
        compare(tokenizer, made, FILE_NAME, ties=tokenizer.model.trainer_spec.model_type == UNIGRAM)
        return _with_bos(made)
    assert isinstance(tokenizer, JsonTokenizer)
    return _with_bos(tokenizer)


def client_notes(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Find what programs that read the tokenizer.json of `tokenizer` are known not to do, as notes.

    Raises:
        ElmExportError: see `client_json`.
    """
    data = client_json(tokenizer)
    notes = []
    if data["model"]["type"] == "Unigram":
        known = "transformers reads it" if data["model"].get("byte_fallback") else "transformers and transformers.js read it"
        notes.append(f"the vocabulary is unigram: {known}; onnxruntime-genai and swift-transformers do not")
    if f'"{json.dumps(OUTER_SPACES)[1:-1]}"' in json.dumps(data.get("normalizer")):
        notes.append("the tokenizer takes away spaces around a text and double ones, which onnxruntime-genai does not")
    return tuple(notes)


def write_tokenizer_files(tokenizer: Tokenizer, context: int, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`, and the file that they were made of. `context` is the most tokens of a text.

    Raises:
        ElmExportError: see `client_json`.
    """
    data = client_json(tokenizer)
    tokenizer.write(folder)
    if not isinstance(tokenizer, JsonTokenizer) or data != tokenizer.data:
        (folder / FILE_NAME).write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(_config(tokenizer, context), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_bos(tokenizer: JsonTokenizer) -> Mapping[str, Any]:
    """The file's data with a post-processor that does what `encode` does."""
    import tokenizers
    from tokenizers import processors

    special: SpecialIds = tokenizer.special
    loaded = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.data, ensure_ascii=False))
    if all(
        loaded.encode(text, add_special_tokens=True).ids == [*special.prefix, *loaded.encode(text, add_special_tokens=False).ids]
        for text in ("a", "")
    ):
        return tokenizer.data
    if not special.adds_bos:
        return {**tokenizer.data, "post_processor": None}
    assert special.bos is not None
    bos = tokenizer.pieces()[special.bos].text
    loaded.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, special.bos)]
    )
    return {**tokenizer.data, "post_processor": json.loads(loaded.to_str())["post_processor"]}


def _config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    pieces, special = tokenizer.pieces(), tokenizer.special
    eos = pieces[tokenizer.eos_id].text
    facts: dict[str, Any] = {
        "tokenizer_class": CLASS,
        "add_bos_token": special.adds_bos,
        "add_eos_token": False,
        "bos_token": None if special.bos is None else pieces[special.bos].text,
        "eos_token": eos,
        "unk_token": None if special.unk is None else pieces[special.unk].text,
        "pad_token": eos if special.pad is None else pieces[special.pad].text,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": tokenizer.chat_template,
    }
    return {key: value for key, value in facts.items() if value is not None}
