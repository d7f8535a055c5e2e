"""JSON documents read into msgspec structs; what does not fit is an error that says where, what was found and what belongs there.

Also the one place where JSON and TOML of other makers are decoded: whatever their bytes are, a failure is a ValueError.
"""

from __future__ import annotations

import json
import operator
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from elmexport.errors import ElmExportError

T = TypeVar("T")

# Beyond what any file of ours or of others holds, and far below what Python's recursion limit and floats can take.
DEEPEST = 64  # levels of objects, lists and tables
LONGEST_NUMBER = 100  # digits of a whole number
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def decode_json(text: str | bytes) -> Any:
    """Decode JSON of another maker's, by the rules of Python's own `json` (NaN and infinity are numbers).

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, a number too long, or half of a surrogate pair, which no UTF-8 text can hold.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check(value)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def decode_toml(text: str | bytes) -> dict[str, Any]:
    """Decode TOML.

    Raises:
        ValueError: not UTF-8, not TOML, nested too deeply, or a number too long.
    """
    try:
        value = tomllib.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check(value)
    return value


_TOO_LARGE = 10**LONGEST_NUMBER
_TOO_DEEP = f"nested deeper than {DEEPEST} levels"


def _check(value: Any) -> None:
    """Refuse what code further on could not take: recursion over deep nesting, floats of long whole numbers.

    Raises:
        ValueError: see there.
    """
    level = [value]
    for _ in range(DEEPEST + 1):
        if any(isinstance(entry, int) and abs(entry) >= _TOO_LARGE for entry in level):
            raise ValueError(f"it holds a whole number of more than {LONGEST_NUMBER} digits")
        level = [entry for part in level for entry in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def parse_json(text: str | bytes, name: str, fix: str) -> Any:
    """Parse JSON by the letter (no NaN, no infinity) into dicts, lists and plain values. `name` is the file, `fix` what to do if it is damaged.

    Raises:
        ElmExportError: not JSON, or nested too deeply.
    """
    try:
        value = msgspec.json.decode(text)
        _check(value)
        return value
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ElmExportError(f"{name} is not JSON ({error}); {fix}") from None


def to_struct(value: Any, kind: type[T], where: str, fix: str, *, root: str = "") -> T:
    """Convert the parsed document `value`, or a part of it, to the struct `kind`.

    `where` names the file; `root` is the part's place in it ("report.tasks.arc_easy"), empty for the whole.

    Raises:
        ElmExportError: a missing or unknown key, or a value of another type or range.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ElmExportError(f"{_explained(str(error), value, where, root)}; {fix}") from None
    except RecursionError:
        raise ElmExportError(f"{where} is nested too deeply; {fix}") from None


_NAMES: Mapping[str, str] = {
    "object": "an object",
    "array": "a list",
    "str": "a text",
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "null": "null",
}
_COMPARE: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    ">=": (operator.ge, "of at least"),
    ">": (operator.gt, "above"),
    "<=": (operator.le, "of at most"),
    "<": (operator.lt, "below"),
}
_KINDS: Mapping[type, str] = {dict: "object", list: "array", str: "str", int: "int", float: "float", bool: "bool", type(None): "null"}
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]|\[(\.\.\.)\]")
Fits = Callable[[Any], bool]
_Reading = tuple[Fits, Callable[[Any], str]]


def _explained(message: str, value: Any, where: str, root: str) -> str:
    """Put msgspec's `message` about `value` in words, with the place and what stands there."""
    what, _, path = message.partition(" - at `$")
    steps = [int(index) if index else name or any_key for name, index, any_key in _STEP.findall(path.removesuffix("`"))]
    for pattern, read in _MESSAGES:
        if match := re.fullmatch(pattern, what):
            fits, words = read(*match.groups())
            place, found = _at(value, steps, fits)
            return f"{_place(where, root, place)} {words(found)}"
    place, found = _at(value, steps, lambda entry: True)
    return f"{_place(where, root, place)} is {_brief(found)} ({what})"


def _wrong_type(expected: str, got: str) -> _Reading:
    return lambda entry: _KINDS.get(type(entry)) == got, lambda entry: f"is {_brief(entry)}, where {_words(expected)} belongs"


def _wrong_length(_: str, expected: str, got: str) -> _Reading:
    return lambda entry: isinstance(entry, list) and len(entry) == int(got), lambda entry: f"has {got} entries, {expected} belong there"


def _out_of_range(kind: str, sign: str, bound: str) -> _Reading:
    within, words = _COMPARE[sign]
    return (
        lambda entry: type(entry) in (int, float) and not within(entry, float(bound)),
        lambda entry: f"is {_brief(entry)}, where {_words(kind)} {words} {bound} belongs",
    )


def _wrong_text(pattern: str) -> _Reading:
    return (
        lambda entry: isinstance(entry, str) and re.search(pattern, entry) is None,
        lambda entry: f"is {_brief(entry)}, where a text like {pattern} belongs",
    )


def _missing(key: str) -> _Reading:
    return lambda entry: isinstance(entry, dict) and key not in entry, lambda entry: f"lacks {key}"


def _unknown(key: str) -> _Reading:
    return lambda entry: isinstance(entry, dict) and key in entry, lambda entry: f"holds {_brief(key)}, which does not belong there"


# msgspec's messages, and how each is read: which entry of a mapping it can be about, and what it says of that entry.
_MESSAGES: tuple[tuple[str, Callable[..., _Reading]], ...] = (
    (r"Expected `(.+)`, got `(.+)`", _wrong_type),
    (r"Expected `(.+)` of length (\d+), got (\d+)", _wrong_length),
    (r"Expected `(.+)` (>=|>|<=|<) (\S+)", _out_of_range),
    (r"Expected `str` matching regex '(.+)'", _wrong_text),
    (r"Object missing required field `(.+)`", _missing),
    (r"Object contains unknown field `(.+)`", _unknown),
)


def _at(value: Any, steps: Sequence[int | str], fits: Fits) -> tuple[list[int | str], Any]:
    """The place that `steps` lead to, and what stands there. msgspec does not name keys of mappings: the first entry that fits is it."""
    return _search(value, steps, fits) or (list(steps), None)


def _search(value: Any, steps: Sequence[int | str], fits: Fits) -> tuple[list[int | str], Any] | None:
    if not steps:
        return ([], value) if fits(value) else None
    step, *rest = steps
    for key in value if step == "..." and isinstance(value, dict) else (step,):
        try:
            found = _search(value[key], rest, fits)
        except (KeyError, IndexError, TypeError):
            continue
        if found is not None:
            return [key, *found[0]], found[1]
    return None


def _place(where: str, root: str, path: Sequence[int | str]) -> str:
    place = root + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"{where}: {place.removeprefix('.')}" if place else where


def _words(kinds: str) -> str:
    return " or ".join(_NAMES.get(kind, kind) for kind in kinds.split(" | "))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
