"""Texts that tell tokenizers apart: spaces, scripts, combining marks, emoji, control tokens spelled out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from elmexport.checkpoint.tokenizer.base import PieceKind, Tokenizer
from elmexport.errors import ElmExportError

PROBES = (
    "",
    "Hello, world! It's 2 o'clock; they'RE late, aren't they?",
    " ",
    "   ",
    "  two  spaces, and  more   inside and after  ",
    "a",
    " a",
    "tab\there\nnew line\r\nand\n\n\nmore\n",
    "\n",
    "\u00a0no-break\u2003em\u3000ideographic space",
    "naïve café, œuvre, Straße, İstanbul, ﬁ ligature",
    "cafe\u0301 n\u0303 a\u030a\u0301 o\u0308 が か\u3099",
    "Ａ ｆｕｌｌ ｗｉｄｔｈ ½ ² Ⅷ ㎞",
    "日本語 中文 한국어 ไทย हिन्दी العربية עברית Ελληνικά Русский",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🤷🏽‍♀️ \U00010348 \U0001d11e",
    "1234567890 3.14159 1e-6 0xFF 1,000,000 ١٢٣",
    "def f(x):\n    return {'a': x ** 2, \"b\": [None, True]}  # ok?\n",
    "<s> </s> <unk> <pad> <0x41> <|endoftext|> <|im_start|>user [INST] [PAD3]",
    "!!!??? --- ===== ____ ```` ''' \"\"\" ... ,,,",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbb",
    "MiXeD CASE camelCaseWord snake_case_word",
    "https://example.org/a/b?c=d&e=%20f#g <b>&amp;</b> \\n",
    "\u202eright to left\u202c zero\u200bwidth soft\u00adhyphen \ufeff",
)


def probes(tokenizer: Tokenizer) -> Iterator[str]:
    """`PROBES`, and texts with the added tokens of `tokenizer` in them, 32 of each kind at most."""
    yield from PROBES
    for kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED):
        for piece in [piece for piece in tokenizer.pieces() if piece.kind is kind][:32]:
            yield from (piece.text, f"a{piece.text}b", f"a {piece.text} b", f"{piece.text}{piece.text}")


def compare(wanted: Tokenizer, found: Tokenizer, words: str, *, ties: bool = False, plain: bool = False) -> None:
    """Compare the ids of the probes; `words` names what `found` was read from.

    `ties`: ids in another order are the same. Of unigram segmentations that are equally likely, rounding chooses. `plain`: only texts that begin
    with no space and whose characters are composed.

    Raises:
        ElmExportError: a text whose ids differ.
    """
    for text in probes(wanted):
        if plain and (text.startswith(" ") or not unicodedata.is_normalized("NFC", text)):
            continue
        ours, theirs = wanted.encode(text), found.encode(text)
        if ours != theirs and not (ties and sorted(ours) == sorted(theirs)):
            raise ElmExportError(
                f"{words} would give the text {_shortened(text)} other ids than {wanted.path.name}: {_differing(theirs, ours)}; please report it with "
                "the tokenizer's file. Without one (--tokenizer none) the model can be exported"
            )


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}…"


def _differing(found: Sequence[int], wanted: Sequence[int]) -> str:
    start = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), min(len(found), len(wanted)))
    return f"{list(found[start : start + 4])} instead of {list(wanted[start : start + 4])} from token {start} on"
