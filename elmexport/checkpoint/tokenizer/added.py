"""Added tokens of a `tokenizer.json`, those that other files name among them, each with its id and kind.

A token with a name that llama.cpp takes for a control token's is one in every format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from elmexport.checkpoint.tokenizer.base import FIX
from elmexport.checkpoint.tokenizer.beside import LARGEST_VOCABULARY, AddedToken, Beside, is_id
from elmexport.errors import ElmExportError

GAP = "\ufdd0"  # begins the text of an id that stands for nothing, where a list has to be filled: no character, so in no text
# What llama.cpp takes for control tokens by their names, whatever a file says of them (llama-vocab.cpp). They are control tokens in every
# format, so that a text has the same ids in all of them.
_NAMES = """
<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> _<EOT> [EOT] [EOS] <｜end▁of▁sentence｜> <end_of_utterance>
<|eom_id|> <|return|> <|call|> <|flush|> <|calls|> </s> <eos> <turn|> <|tool_response> [e~[
<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>
<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>
<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>
<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
"""
CONTROL_NAMES = frozenset(_NAMES.split())


def added_tokens(data: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """The added tokens that `data`, a tokenizer.json, lists."""
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return tuple(
        AddedToken(entry["id"], entry["content"], **{flag: bool(entry.get(flag)) for flag in flags})
        for entry in data.get("added_tokens") or ()
    )


def vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """Ids by text of the vocabulary that was trained, of `data`, a tokenizer.json."""
    found = data["model"]["vocab"]
    return {entry[0]: i for i, entry in enumerate(found)} if isinstance(found, list) else dict(found)


def merges(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """BPE's merges of `data`, a tokenizer.json, the first of them first."""
    found = (merge if isinstance(merge, list) else merge.split(" ", 1) for merge in data["model"].get("merges", ()))
    return [(left, right) for left, right in found]


def merged_texts(data: Mapping[str, Any]) -> set[str]:
    """The texts that merges join and make: these are pieces of words, whatever a file calls them."""
    return {text for left, right in merges(data) for text in (left, right, left + right)}


def complete(data: Mapping[str, Any], beside: Beside, control: Collection[int], path: Path) -> dict[str, Any]:
    """A tokenizer.json as every client should read it: all added tokens with their ids and kinds, texts neither cut off nor padded.

    `control` are ids that begin or end texts: of added tokens, control tokens.

    Where the library would give a token another id than the file says (it counts on from the last one), the token stands in the
    vocabulary too, which decides.

    Raises:
        ElmExportError: an id for two texts, two ids for one, or something that is no id.
    """
    trained = vocabulary(data)
    tokens = list(_merged(data, beside, control, trained, path))
    texts = {token_id: text for text, token_id in trained.items()}
    odd = next((token_id for token_id in (*texts, *(token.id for token in tokens)) if not is_id(token_id)), None)
    if odd is not None:
        raise ElmExportError(f"{path}: {odd!r} is no id of a token; ids are whole numbers from 0, below {LARGEST_VOCABULARY}: {FIX}")
    for token in tokens:
        if texts.setdefault(token.id, token.content) != token.content:
            raise ElmExportError(
                f"{path}: the id {token.id} is of {texts[token.id]!r}, but the added token {token.content!r} has it too, in this file or "
                f"in one beside it; {FIX}"
            )
    model = data["model"]
    if not _ids_follow(tokens, trained):
        model = {**model, "vocab": _with_tokens(model["vocab"], tokens, trained)}
    entries = [token.to_json() for token in tokens]
    return {**data, "truncation": None, "padding": None, "added_tokens": entries, "model": model}


def _merged(
    data: Mapping[str, Any], beside: Beside, control: Collection[int], trained: Mapping[str, int], path: Path
) -> Iterator[AddedToken]:
    """The tokens of all files, by id."""
    tokens = {token.content: token for token in added_tokens(data)}
    for token in beside.added:
        known = tokens.get(token.content)
        known_id = trained.get(token.content) if known is None else known.id
        if known_id not in (None, token.id):
            raise ElmExportError(
                f"{path} gives {token.content!r} the id {known_id}, a file beside it {token.id}; keep the one that the model was trained with"
            )
        if known is None:
            tokens[token.content] = token
    joined = merged_texts(data)
    for text in beside.control:
        if text not in tokens and text in trained and text not in joined:
            tokens[text] = AddedToken(trained[text], text)
    for text, token in tokens.items():
        if text in beside.control or text in CONTROL_NAMES or token.id in control:
            tokens[text] = replace(token, special=True)
    yield from sorted(tokens.values(), key=lambda token: token.id)


def _ids_follow(tokens: list[AddedToken], trained: Mapping[str, int]) -> bool:
    """Whether the library gives every token its id: those of the vocabulary have theirs, the others are counted on from its size."""
    following = len(trained)
    for token in tokens:
        if token.content not in trained:
            if token.id != following:
                return False
            following += 1
        else:
            following = max(following, token.id + 1)
    return True


def _with_tokens(found: Any, tokens: list[AddedToken], trained: Mapping[str, int]) -> Any:
    """A model's vocabulary with the tokens in it, `tokens` sorted by id."""
    new = [token for token in tokens if token.content not in trained]
    if not isinstance(found, list):
        return {**found, **{token.content: token.id for token in new}}
    filled = list(found)
    lowest = min(score for _, score in filled)  # of what is never found in a text, any score will do that leaves the lowest one what it is
    for token in new:
        filled += [[f"{GAP}{i}", lowest] for i in range(len(filled), token.id)]
        filled.append([token.content, lowest])
    return filled
