"""Files beside a tokenizer: added tokens, which of them begin and end texts, the chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elmexport.documents import decode_json
from elmexport.errors import ElmExportError

CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"
SPECIAL_MAP = "special_tokens_map.json"  # of older folders; what the other says counts
TEMPLATE = "chat_template.jinja"
BESIDE = (CONFIG, ADDED, SPECIAL_MAP, TEMPLATE)
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
LARGEST_VOCABULARY = 1 << 22  # tokens; those of models have up to some hundred thousand
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary that was trained, as the `tokenizers` library describes it."""

    id: int
    content: str
    special: bool = True  # a control token: not text
    normalized: bool = False  # looked for in the normalized text
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def to_json(self) -> dict[str, Any]:
        """An entry of `added_tokens` in a tokenizer.json, in the library's order."""
        names = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Beside:
    """Facts beside the vocabulary; None and empty where no file says anything."""

    tokens: Mapping[str, str] = field(default_factory=dict)  # by role ("bos_token"), the text of the token
    control: frozenset[str] = frozenset()  # texts of these and of other control tokens
    add_bos: bool | None = None
    added: tuple[AddedToken, ...] = ()
    template: str | None = None


def read_beside(folder: Path) -> Beside:
    """Read the files of `BESIDE` that lie in `folder`.

    Raises:
        ElmExportError: a damaged file, or one that says something else than such files do.
    """
    config, older = _object(folder / CONFIG), _object(folder / SPECIAL_MAP)
    tokens = {role: text for role in _ROLES if (text := _text(config.get(role, older.get(role)))) is not None}
    lists = [found for name in _LISTS for data in (config, older) if isinstance(found := data.get(name), list)]
    control = frozenset({*tokens.values(), *(text for entry in lists for one in entry if (text := _text(one)) is not None)})
    add_bos = config.get("add_bos_token")
    added = {token.content: token for token in _added(folder / ADDED)}
    added |= {token.content: token for token in _described(folder / CONFIG, config)}
    template = read_template_beside(folder)
    return Beside(tokens, control, add_bos if isinstance(add_bos, bool) else None, tuple(added.values()), template)


def read_template_beside(folder: Path) -> str | None:
    """The chat template of the model in `folder`; None where it has none.

    Raises:
        ElmExportError: a damaged file.
    """
    if (folder / TEMPLATE).is_file():
        return _read(folder / TEMPLATE)
    return default_template(_object(folder / CONFIG).get("chat_template"))


def default_template(value: object) -> str | None:
    """The template in a tokenizer_config.json's `chat_template`: a text, or a list of several by name."""
    if isinstance(value, list):
        value = next((one.get("template") for one in value if isinstance(one, dict) and one.get("name") == "default"), None)
    return value if isinstance(value, str) and value.strip() else None


def _added(path: Path) -> Iterator[AddedToken]:
    """The tokens of an `added_tokens.json`, text to id."""
    for content, token_id in _object(path).items():
        if not is_id(token_id):
            raise ElmExportError(f"{path}: the id of {content!r} is {token_id!r}; ids are whole numbers from 0: mend or remove the file")
        yield AddedToken(token_id, content, special=False)  # the file does not say; tokenizer_config.json may


def _described(path: Path, config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The tokens of a tokenizer_config.json's `added_tokens_decoder`, id to description."""
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise ElmExportError(f"{path}: added_tokens_decoder is a {type(listed).__name__}, where an object belongs; mend or remove the file")
    for token_id, facts in listed.items():
        if not (token_id.isdecimal() and len(token_id) < 9 and isinstance(facts, dict) and isinstance(facts.get("content"), str)):
            raise ElmExportError(
                f"{path}: added_tokens_decoder has {token_id!r}: {facts!r}, where an id and a token's description belong; mend or remove the file"
            )
        flags = {name: bool(facts.get(name, False)) for name in ("special", "normalized", "lstrip", "rstrip", "single_word")}
        yield AddedToken(int(token_id), facts["content"], **flags)


def _text(token: object) -> str | None:
    """A token as text, or as an object that holds it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def is_id(value: object) -> bool:
    """Whether `value` can be the id of a token: what is read by id is a list as long as the highest one."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_VOCABULARY


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = decode_json(_read(path))
    except ValueError as error:
        raise ElmExportError(f"{path} is not JSON ({error}); download it again, or remove it") from None
    if not isinstance(data, dict):
        raise ElmExportError(f"{path} holds a JSON {type(data).__name__}, not an object; download it again, or remove it")
    return data


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ElmExportError(f"{path} is not UTF-8 text (byte {error.start}); download it again, or remove it") from None
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}; check the file and its permissions") from None
