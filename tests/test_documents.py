"""Documents that do not fit their type: the error names the file, the place, what stands there and what belongs there."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, Struct

from elmexport.documents import decode_json, decode_toml, parse_json, to_struct
from elmexport.errors import ElmExportError


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    size: Annotated[int, Meta(ge=1)]
    ends: tuple[float, float] = (0.0, 1.0)
    hash: Annotated[str, Meta(pattern="^[0-9a-f]+$")] = "0"
    kind: Literal["a", "b"] = "a"


class Document(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    parts: dict[str, Part]
    more: tuple[Part, ...] = ()
    ratio: float | None = None


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], "is [1], where an object belongs"),
        ({"parts": {}}, "lacks name"),
        ({"name": "x", "parts": {}, "colour": 1}, "holds 'colour', which does not belong there"),
        ({"name": 7, "parts": {}}, "name is 7, where a text belongs"),
        ({"name": "x", "parts": {}, "ratio": "half"}, "ratio is 'half', where a finite number or null belongs"),
        ({"name": "x", "parts": {"good": {"size": 1}, "bad": {}}}, "parts.bad lacks size"),
        ({"name": "x", "parts": {"good": {"size": 1}, "bad": {"size": True}}}, "parts.bad.size is True, where a whole number belongs"),
        (
            {"name": "x", "parts": {"good": {"size": 1}, "bad": {"size": 0}}},
            "parts.bad.size is 0, where a whole number of at least 1 belongs",
        ),
        ({"name": "x", "parts": {"good": {"size": 1}, "bad": {"size": 1, "x": 1}}}, "parts.bad holds 'x', which does not belong there"),
        ({"name": "x", "parts": {"bad": {"size": 1, "ends": [1]}}}, "parts.bad.ends has 1 entries, 2 belong there"),
        (
            {"name": "x", "parts": {"good": {"size": 1}, "bad": {"size": 1, "hash": "no"}}},
            "parts.bad.hash is 'no', where a text like ^[0-9a-f]+$ belongs",
        ),
        ({"name": "x", "parts": {}, "more": [{"size": 1}, {"size": 2, "kind": "c"}]}, "more[1].kind is 'c' (Invalid enum value 'c')"),
        ({"name": "x" * 100 + "", "parts": ["y" * 100]}, f"parts is ['{'y' * 35}..., where an object belongs"),
    ],
)
def test_messages(document: Any, message: str) -> None:
    with pytest.raises(ElmExportError, match=f"^{re.escape('f.json')}:? {re.escape(message)}; write it again$"):
        to_struct(document, Document, "f.json", "write it again")


def test_a_part_is_named_by_its_place() -> None:
    with pytest.raises(ElmExportError, match=r"^f\.json: parts\.bad lacks size; write it again$"):
        to_struct({}, Part, "f.json", "write it again", root="parts.bad")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000, b"{} {}"])
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(ElmExportError, match=r"^f\.json is not JSON \(.*\); write it again$"):
        parse_json(text, "f.json", "write it again")


@pytest.mark.parametrize("decode", [decode_json, partial(parse_json, name="a.json", fix="mend it")])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 90 + "]" * 90,
        '{"a":' * 90 + "1" + "}" * 90,
        "9" * 5001,
        "-" + "9" * 200,
        '{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        "{",
    ],
    ids=["endless", "nested lists", "nested objects", "a long number", "a number beyond floats", "half a character", "no UTF-8", "half"],
)
def test_whatever_the_bytes_are_a_failure_is_foreseen(decode: Callable[[str | bytes], Any], text: str | bytes) -> None:
    with pytest.raises((ValueError, ElmExportError)):
        decode(text)


def test_what_others_write_is_read() -> None:
    written = (
        '{"model_max_length": 1000000000000000019884624838656, "smile": "\\ud83d\\ude00", "nan": NaN, "deep": ' + "[" * 60 + "]" * 60 + "}"
    )
    assert decode_json(written)["smile"] == "\U0001f600"


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5001, "a = " + "9" * 200, b"a = '\xff'", "a ="])
def test_toml_fails_with_value_errors_alone(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        decode_toml(text)
