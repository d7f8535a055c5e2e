"""Every way to spoil a JSON document in one place: a key less, a key more, a value of another type."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

WRONG = (None, True, "spoiled", 7, -1, 1.5, 10**40, float("nan"), float("inf"), [], ["spoiled"], {}, {"spoiled": 1})
Place = tuple[str | int, ...]


def places(document: Any, at: Place = ()) -> Iterator[Place]:
    """Every place of `document` in which something stands, the whole of it among them."""
    yield at
    entries: Any = ()
    if isinstance(document, dict):
        entries = document.items()
    elif isinstance(document, list):
        entries = enumerate(document)
    for key, value in entries:
        yield from places(value, (*at, key))


def at(document: Any, place: Place) -> Any:
    """What stands in `place`."""
    for key in place:
        document = document[key]
    return document


def without(document: Any, place: Place) -> Any:
    """A copy of `document` that lacks what stands in `place`."""
    changed = copy.deepcopy(document)
    del at(changed, place[:-1])[place[-1]]
    return changed


def having(document: Any, place: Place, value: Any) -> Any:
    """A copy of `document` with `value` in `place`, which may be new."""
    if not place:
        return value
    changed = copy.deepcopy(document)
    at(changed, place[:-1])[place[-1]] = value
    return changed


def spoilt(document: Any, place: Place) -> Iterator[tuple[str, Any]]:
    """Every copy of `document` with something wrong in `place`, and in words what."""
    here = at(document, place)
    if place:
        yield "removed", without(document, place)
    if isinstance(here, dict):
        yield "one key more", having(document, (*place, "spoiled"), 1)
    for value in WRONG:
        if type(value) is not type(here) or value != here:
            yield f"{value!r} in the place of {here!r:.40}", having(document, place, value)
