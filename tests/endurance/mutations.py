"""Mutations of files, each by a seeded generator: bytes anywhere, and what a file's own structure lets through to deeper code.

A mutation takes the sound bytes of one file and gives spoilt ones.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.damage import WRONG, at, having, places, without

Mutation = Callable[[bytes, random.Random], bytes]

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_DEEP = 3000
_TEXTS = (
    *("", " ", "\x00", "\ud7ff", "../x", "/etc/passwd", "a" * 5000, "\N{PILE OF POO}", "{{ 1/0 }}", "{% for i in range(10**9) %}{% endfor %}", "9" * 5001),
    *("NaN", "-1", "1e999", "</s>", "<0xZZ>", "\ufdd0", "\u2581", "%s%n", "int4-block0", "int4-block" + "9" * 50, "layers", "<script>", "C:\\x"),
)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random, head: int = 4096) -> bytes:
    """One to four changes: half of them in the first `head` bytes, where formats keep what describes the rest."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = min(len(found), head) if rng.random() < 0.5 else len(found)
        place = rng.randrange(end) if end else 0
        size = min(rng.choice((1, 2, 4, 8, 16, 100)), len(found) - place)
        match rng.randrange(9):
            case 0 if found:
                found[place] ^= 1 << rng.randrange(8)
            case 1:
                found[place : place + size] = rng.randbytes(size)
            case 2:
                del found[place : place + size]
            case 3:
                found[place:place] = rng.randbytes(size)
            case 4:
                found[place:place] = found[place : place + size] * rng.choice((1, 2, 50))
            case 5:
                width = rng.choice((1, 2, 4, 8))
                found[place : place + width] = (rng.choice(_NUMBERS) % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
            case 6:
                del found[place:]
            case 7:
                found[place : place + size] = bytes(size)
            case _:
                other = rng.randrange(len(found)) if found else 0
                found[place : place + size] = found[other : other + size]
    return bytes(found)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A value changed, lost, added or nested in one to three places; now and then the text itself."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = _mutate_document(document, rng)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    text = text.replace('"@deep@"', rng.choice(("[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "[" * _DEEP)))
    text = text.replace('"@long@"', "7" * 5001).replace('"@half@"', '"\\ud800"').replace('"@twice@"', '1, "format": 1')
    return text.encode("utf-8", "surrogatepass")


def _mutate_document(document: Any, rng: random.Random) -> Any:
    found = list(places(document))
    place = rng.choice(found)
    here = at(document, place)
    match rng.randrange(8):
        case 0 if place:
            return without(document, place)
        case 1 if isinstance(here, dict):
            return having(document, (*place, rng.choice(_TEXTS)), at(document, rng.choice(found)))
        case 2:
            return having(document, place, rng.choice(("@deep@", "@long@", "@half@", "@twice@")))
        case 3:
            return having(document, place, rng.choice(_TEXTS))
        case 4:
            return having(document, place, at(document, rng.choice(found)))
        case 5 if isinstance(here, int | float):
            return having(document, place, rng.choice((-here, here + 1, here - 1, here * 1000, here / 3, *_NUMBERS)))
        case 6 if isinstance(here, list) and here:
            return having(document, place, rng.choice((here * 2, here[:-1], here[::-1], [here[0]] * len(here))))
        case _:
            return having(document, place, rng.choice(WRONG))


def mutate_jsonl(data: bytes, rng: random.Random) -> bytes:
    """One line mutated as JSON, or the text."""
    lines = data.splitlines()
    if rng.random() < 0.1:
        return mutate_bytes(data, rng)
    chosen = rng.randrange(len(lines))
    lines[chosen] = mutate_json(lines[chosen], rng)
    return b"\n".join(lines)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Values, lines and tokens of a text (TOML, Jinja2) changed, lost, doubled and nested."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    lines = data.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(lines))
        key, sign, _ = lines[place].partition(" = ")
        deep = rng.choice(
            ("[" * _DEEP + "]" * _DEEP, "[" * _DEEP, "{a=" * _DEEP, "9" * 5001, "9" * 400, "nan", "[1, []]", "{}", "-1", "1e400")
        )
        match rng.randrange(6):
            case 0:
                lines[place] = f"{key}{sign}{json.dumps(rng.choice(_TEXTS))}"
            case 1:
                lines[place] = f"{key}{sign}{deep}"
            case 2:
                del lines[place]
            case 3:
                lines.insert(rng.randrange(len(lines) + 1), lines[place])
            case 4:
                words = lines[place].split(" ")
                words[rng.randrange(len(words))] = rng.choice((*_TEXTS, deep, ".".join("a" * 500)))
                lines[place] = " ".join(words)
            case _:
                lines.insert(place, rng.choice((f"{key}.a{sign}1", "[[rule]]", "[rule]", "a" * 10**5, ".".join("a" * 2000) + " = 1")))
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header as JSON, its metadata included; or bytes anywhere."""
    chance = rng.random()
    if chance < 0.25:
        return mutate_bytes(data, rng, 64)
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if chance < 0.35:
        return data[: 8 + size] + mutate_bytes(rest, rng)
    document = json.loads(header)
    inner = [key for key, value in document.get("__metadata__", {}).items() if value.startswith("{")]
    if inner and chance < 0.75:
        key = rng.choice(inner)
        text = mutate_json(document["__metadata__"][key].encode(), rng).decode("utf-8", "surrogateescape")
        header = json.dumps(having(document, ("__metadata__", key), text)).encode()
    else:
        header = mutate_json(header, rng)
    return len(header).to_bytes(8, "little") + header + rest


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """A record of a stored archive cut, changed, compressed, renamed, doubled or lost, its checksum right; or bytes anywhere."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    place = (
        rng.randrange(len(records)) if rng.random() < 0.5 else next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    )
    name, content = records[place]
    compressed = None
    match rng.randrange(7):
        case 0:
            records[place] = (name, content[: rng.randrange(len(content) + 1)])
        case 1 | 2:
            records[place] = (name, mutate_bytes(content, rng))
        case 3:
            compressed = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        case 4:
            records[place] = (rng.choice(("../x", "/x", "model/data/../0", "model/data/0", "x" * 200)), content)
        case 5:
            records.append(rng.choice(records))
        case _:
            del records[place]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive, warnings.catch_warnings(action="ignore"):  # names that come twice are meant to
        for i, (name, content) in enumerate(records):
            archive.writestr(zipfile.ZipInfo(name), content, compressed if compressed is not None and i == place else zipfile.ZIP_STORED)
    return target.getvalue()


def mutate_protobuf(data: bytes, rng: random.Random, depth: int = 8) -> bytes:
    """A field of a protobuf message, however deep, changed, lost, doubled or moved; or bytes anywhere."""
    fields = _fields(data)
    if not fields or rng.random() < (0.1 if depth == 8 else 0.02):
        return mutate_bytes(data, rng, 64)
    place = rng.randrange(len(fields))
    number, kind, value = fields[place]
    match rng.randrange(8 if kind == 2 else 5):
        case 0:
            del fields[place]
        case 1:
            fields.append(fields[place])
        case 2:
            fields[place] = (rng.choice((number + 1, number - 1, rng.randrange(1, 40))), kind, value)
        case 3 | 4 if kind == 0:
            fields[place] = (number, kind, _varint(rng.choice(_NUMBERS)))
        case 3 | 4 if kind == 2:
            fields[place] = (
                number,
                kind,
                rng.choice((b"", b"\xff\xfe", value[:-1], value * 2, *(text.encode("utf-8", "replace") for text in _TEXTS))),
            )
        case 3 | 4:
            fields[place] = (
                number,
                kind,
                rng.choice((bytes(len(value)), b"\xff" * len(value), struct.pack("<d", float("nan"))[: len(value)])),
            )
        case _:
            fields[place] = (number, kind, mutate_protobuf(value, rng, depth - 1) if depth else mutate_bytes(value, rng))
    return b"".join(_varint(number << 3 | kind) + (_varint(len(value)) if kind == 2 else b"") + value for number, kind, value in fields)


def _fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Number, wire type and bytes of each field; empty where `data` is no message."""
    found, place = [], 0
    try:
        while place < len(data):
            start = place
            tag, place = _read_varint(data, place)
            number, kind = tag >> 3, tag & 7
            start = place
            if kind == 0:
                _, place = _read_varint(data, place)
            elif kind == 2:
                size, start = _read_varint(data, place)
                place = start + size
            else:
                place += {1: 8, 5: 4}[kind]
            if number == 0 or place > len(data):
                return []
            found.append((number, kind, data[start:place]))
    except (IndexError, KeyError):
        return []
    return found


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


@lru_cache(maxsize=4)
def _gguf_texts(data: bytes) -> list[int]:
    """Where a length of 1 to 79, which a text of the metadata may follow, is written in eight bytes."""
    return [found.start() for found in re.finditer(rb"(?=[\x01-\x4f]\x00{7})", data)]


def mutate_gguf(data: bytes, rng: random.Random) -> bytes:
    """A length, a type, a text or a number anywhere before the tensors, now and then the tensors."""
    found, texts = bytearray(data), _gguf_texts(data)
    if rng.random() < 0.4 or not texts:
        return mutate_bytes(data, rng, 1500)
    place = rng.choice(texts[:400] if rng.random() < 0.7 else texts)
    size = found[place]
    match rng.randrange(4):
        case 0:
            found[place : place + 8] = struct.pack("<Q", rng.choice(_NUMBERS))
        case 1:
            found[place + 8 : place + 8 + size] = rng.randbytes(size)
        case 2:
            found[place + 8 + size : place + 12 + size] = struct.pack("<I", rng.randrange(16))
        case _:  # as wide as the value is, where what is before it is the name of one
            width = {4: 4, 5: 4, 6: 4, 7: 1}.get(found[min(place + 8 + size, len(found) - 1)], 8)
            found[place + 12 + size : place + 12 + size + width] = (rng.choice(_NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(found)


_BY_NAME: Mapping[str, Mutation] = {
    ".json": mutate_json,
    ".jsonl": mutate_jsonl,
    ".toml": mutate_text,
    ".jinja": mutate_text,
    ".safetensors": mutate_safetensors,
    ".pt": mutate_zip,
    ".bin": mutate_zip,
    ".model": mutate_protobuf,
    ".onnx": mutate_protobuf,
    ".mlmodel": mutate_protobuf,
    ".gguf": mutate_gguf,
}


def mutation_for(path: Path, data: bytes) -> Mutation:
    """The mutation that knows the format of `path`."""
    found = _BY_NAME.get(path.suffix, mutate_bytes)
    return mutate_bytes if found is mutate_zip and not zipfile.is_zipfile(io.BytesIO(data)) else found
