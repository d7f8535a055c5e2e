"""A `tokenizer.json`, read by Hugging Face's `tokenizers`: any that the library loads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from elmexport.checkpoint.tokenizer.added import GAP, added_tokens, complete, merged_texts, merges, vocabulary
from elmexport.checkpoint.tokenizer.base import FIX, Piece, PieceKind, Span, SpecialIds, Tokenizer
from elmexport.checkpoint.tokenizer.beside import AddedToken, Beside
from elmexport.documents import decode_json
from elmexport.errors import ElmExportError

FILE_NAME = "tokenizer.json"
UNREACHABLE_SCORE = -1e9  # below every merge's: what Llama's own vocabulary gives to pieces that must not be merged into
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BOS_NAMES = ("<s>", "<|begin_of_text|>")  # where no file says which token begins a text
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, `data` what it holds, with the tokens that the files beside it add."""

    def __init__(
        self, path: Path, data: Mapping[str, Any] | None = None, beside: Beside | None = None, control: Collection[int] = ()
    ) -> None:
        """Read `path`; or take `data`, a tokenizer.json made of the file `path`. `control`: see `complete`.

        Raises:
            ElmExportError: damaged file, or added tokens that contradict each other.
        """
        self.path = path
        beside = beside or Beside()
        self._source = _read(path) if data is None else None
        with self._errors():
            given = data if data is not None else decode_json(self._source or "")
            self.data = complete(given, beside, control, path)
            self._tokenizer = _load(self.data)
        self._verbatim = self._source is not None and self.data == given
        self.chat_template = beside.template
        self.added = added_tokens(self.data)
        ids = vocabulary(self.data) | {token.content: token.id for token in self.added}
        self.vocab_size = 1 + max(ids.values(), default=-1)
        wrong = next((token for token in self.added if self._tokenizer.token_to_id(token.content) != token.id), None)
        if wrong is not None or not ids:
            raise damaged(path, ValueError(f"no place for {wrong.content!r} at id {wrong.id}" if wrong else "an empty vocabulary"))
        self._before = self._put_before()
        self.puts_bos = bool(self._before)
        self.special = self._special_ids(beside, ids)
        named = (*self._before, self.special.bos, *self.special.eos, self.special.unk, self.special.pad)
        beyond = next((token_id for token_id in named if token_id is not None and not 0 <= token_id < self.vocab_size), None)
        if beyond is not None:
            raise damaged(path, ValueError(f"it names a token of id {beyond}, the vocabulary ends at {self.vocab_size - 1}"))

    @property
    def model(self) -> Mapping[str, Any]:
        """The part of the file that splits words into pieces."""
        found: Mapping[str, Any] = self.data["model"]
        return found

    def _special_ids(self, beside: Beside, ids: Mapping[str, int]) -> SpecialIds:
        control = {token.content: token.id for token in self.added if token.special}

        def role(name: str, usual: Sequence[str] = ()) -> int | None:
            named = beside.tokens.get(name)
            return ids.get(named) if named is not None else next((control[text] for text in usual if text in control), None)

        bos = self._before[0] if self._before else role("bos_token", _BOS_NAMES)
        adds = beside.add_bos if beside.add_bos is not None else bos is not None
        eos = role("eos_token", _EOS_NAMES)
        unk: object = self.model.get("unk_id", self.model.get("unk_token"))
        unk_id = ids.get(unk) if isinstance(unk, str) else unk
        return SpecialIds(
            bos, adds and bos is not None, () if eos is None else (eos,), unk_id if isinstance(unk_id, int) else None, role("pad_token")
        )

    def _put_before(self) -> list[int]:
        """What the file's own post-processor puts before every text."""
        with self._errors():
            with_them, without = (self._tokenizer.encode("a", add_special_tokens=add).ids for add in (True, False))
        return list(with_them[: with_them.index(without[0])]) if without and without[0] in with_them else []

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special and not self._merges_only:
            return self._encode_by(self._disguised, text)
        self._tokenizer.encode_special_tokens = not parse_special
        return self._encode_by(self._tokenizer, text)

    def _encode_by(self, tokenizer: Any, text: str) -> list[int]:
        with self._errors():
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the library ends a call with into our error: it raises bare Exception, and where it panics, being Rust, no Exception at all."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, ElmExportError) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
                raise
            raise damaged(self.path, error) from None

    def encode_spans(self, spans: Sequence[Span]) -> list[int]:
        control = [token for token in self.added if token.special]
        if not any(token.content in span.text for span in spans if not span.markup for token in control):
            return self._encode("".join(span.text for span in spans), True)
        by_length = sorted(control, key=lambda token: -len(token.content))
        texts = []
        for span in spans:
            text = span.text
            if span.markup and by_length:
                pattern = "|".join(re.escape(token.content) for token in by_length)
                text = re.sub(pattern, lambda found: self._disguises.get(found[0], found[0]), text)
            texts.append(text)
        return self._encode_by(self._disguised, "".join(texts))

    @property
    def _merges_only(self) -> bool:
        """Whether a control token's text can only come of merges, and so never does; else the vocabulary itself would find it in a text."""
        return self.model["type"] == "BPE" and not self.model.get("ignore_merges")

    @cached_property
    def _disguises(self) -> dict[str, str]:
        """For every control token a text that nobody can have typed."""
        secret = secrets.token_hex(8)
        joined = merged_texts(self.data)
        return {token.content: f"\ufdd0{secret} {token.id}\ufdd1" for token in self.added if token.special and token.content not in joined}

    @cached_property
    def _disguised(self) -> Any:
        """The tokenizer with every control token under its disguise: as themselves they are plain text to it."""

        def name(text: str) -> str:
            return self._disguises.get(text, text)

        model = dict(self.model)
        found = model["vocab"]
        model["vocab"] = (
            [[name(text), score] for text, score in found] if isinstance(found, list) else {name(t): i for t, i in found.items()}
        )
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = name(model["unk_token"])
        tokens = [
            token.to_json() | ({"content": name(token.content), "normalized": False} if token.special else {}) for token in self.added
        ]
        return _load({**self.data, "model": model, "added_tokens": tokens, "post_processor": None})

    def pieces(self) -> list[Piece]:
        """The vocabulary; for BPE with SentencePiece's scores, which the file does not hold.

        A merge's rank is the order of its result's score, so a piece gets minus its place among the results; single characters, which
        nothing is merged into, follow. That restores the order of the original scores, which is all that tokenizing looks at.
        """
        texts = [""] * self.vocab_size
        for text, i in vocabulary(self.data).items():
            texts[i] = "" if text.startswith(GAP) else text
        added = {token.id: token for token in self.added}
        for i, token in added.items():
            texts[i] = token.content
        kinds = [self._kind(i, text, added) for i, text in enumerate(texts)]
        scores = self._scores(texts, kinds)
        return [
            Piece(text, scores.get(text, UNREACHABLE_SCORE) if kind is PieceKind.NORMAL else 0.0, kind)
            for text, kind in zip(texts, kinds, strict=True)
        ]

    def merges(self) -> list[tuple[str, str]]:
        """BPE's merges, the first of them first."""
        return merges(self.data)

    def _scores(self, texts: Sequence[str], kinds: Sequence[PieceKind]) -> dict[str, float]:
        if isinstance(self.model["vocab"], list):
            return dict(self.model["vocab"])
        results = dict.fromkeys(left + right for left, right in self.merges())
        normal = {text for text, kind in zip(texts, kinds, strict=True) if kind is PieceKind.NORMAL}
        ranked = [text for text in results if text in normal]
        ranked += [text for text in texts if text in normal and text not in results and len(text) == 1]
        return {text: -float(rank) for rank, text in enumerate(ranked)}

    def _kind(self, token_id: int, text: str, added: Mapping[int, AddedToken]) -> PieceKind:
        if token_id == self.special.unk:
            return PieceKind.UNKNOWN
        if token_id in added:
            return PieceKind.CONTROL if added[token_id].special else PieceKind.USER_DEFINED
        if self.model.get("byte_fallback") and _BYTE.fullmatch(text):
            return PieceKind.BYTE
        return PieceKind.NORMAL if text else PieceKind.UNUSED

    def write(self, folder: Path) -> None:
        if self._verbatim:
            shutil.copyfile(self.path, folder / FILE_NAME)
        else:
            (folder / FILE_NAME).write_text(json.dumps(self.data, indent=2, ensure_ascii=False), encoding="utf-8")

    def _decode(self, ids: list[int]) -> str:
        with self._errors():
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _content(self) -> str:
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()


def damaged(path: Path, error: BaseException) -> ElmExportError:
    """The error of a file that its library cannot read."""
    kind = "tokenizers" if path.suffix == ".json" else "SentencePiece"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ElmExportError(f"{path} is not a {kind} file, or is damaged ({reason}); download it again, or {FIX}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, error) from None


def _load(data: Mapping[str, Any]) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
