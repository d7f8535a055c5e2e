"""The contract of `Runtime`: arguments, what the cache holds, `last`, and continuations, on an engine that fails or answers on demand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.runtimes.base import Runtime

VOCAB, CONTEXT = 11, 8


class Remembering(Runtime):
    """Each row of logits says which tokens its token could see: a count per id."""

    name = "remembering"

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.context = VOCAB, CONTEXT
        self.tokens = np.zeros(CONTEXT, np.int64)
        self.fails = False

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        if self.fails:
            raise RuntimeError("the engine broke")
        end = position + len(ids)
        self.tokens[position:end] = ids
        return seen(self.tokens[:end])[end - last :]


def seen(ids: Any) -> NDArray[np.float32]:
    """What `Remembering` says of a whole sequence: `[tokens, vocab]`."""
    return np.eye(VOCAB, dtype=np.float32)[np.asarray(ids)].cumsum(0)


def test_last() -> None:
    runtime = Remembering()
    ids = [1, 2, 3, 4, 5]
    for last in (1, 2, 5):
        np.testing.assert_array_equal(runtime.logits(ids, last=last), seen(ids)[-last:])
        assert runtime.length == 5
    np.testing.assert_array_equal(runtime.logits(ids, last=None), seen(ids))


@pytest.mark.parametrize("last", [0, -1, 4])
def test_last_out_of_range(last: int) -> None:
    runtime = Remembering()
    runtime.logits([1, 2])
    with pytest.raises(ElmExportError, match=f"last {last} tokens are asked for, of 3 fed; give last from 1 to 3"):
        runtime.logits([1, 2, 3], last=last)
    assert runtime.length == 2


@pytest.mark.parametrize("position", [0, 2, 5])
def test_continuations_follow_the_prefix_alone(position: int) -> None:
    runtime = Remembering()
    ids = [1, 2, 3, 4, 5]
    runtime.logits(ids)
    continuations = [[6, 7, 8], np.array([9]), [10, 10]]
    found = runtime.continuations(continuations, position)
    assert len(found) == 3
    for logits, continuation in zip(found, continuations, strict=True):
        np.testing.assert_array_equal(logits, seen([*ids[:position], *continuation])[position:])
    assert runtime.length == position
    if position:  # feeding goes on where the prefix ended
        np.testing.assert_array_equal(runtime.logits([0], position), seen([*ids[:position], 0])[-1:])


def test_no_continuations() -> None:
    runtime = Remembering()
    runtime.logits([1, 2, 3])
    assert runtime.continuations([], 2) == []
    assert runtime.length == 2


@pytest.mark.parametrize(
    ("continuation", "position", "message"),
    [
        ([], 2, "no token ids were given; logits need at least one"),
        ([3, VOCAB], 2, f"token id {VOCAB} is outside the vocabulary, 0 to {VOCAB - 1}"),
        ([-1], 2, "token id -1 is outside the vocabulary"),
        ([1], 4, "position is 4, but the cache holds 3 tokens"),
        ([1], -1, "position is -1, but the cache holds 3 tokens"),
        ([1] * 7, 2, "7 tokens at position 2 need a context of 9; this artifact holds 8"),
    ],
)
def test_bad_continuations(continuation: list[int], position: int, message: str) -> None:
    """Refused before anything is computed, the good one in front of the bad one included."""
    runtime = Remembering()
    runtime.logits([1, 2, 3])
    with pytest.raises(ElmExportError, match=message):
        runtime.continuations([[5], continuation], position)
    assert runtime.length == 3
    assert runtime.tokens[:4].tolist() == [1, 2, 3, 0]


def test_no_continuations_past_the_cache() -> None:
    with pytest.raises(ElmExportError, match="position is 1, but the cache holds 0 tokens"):
        Remembering().continuations([], 1)


def test_what_an_engine_broke_is_forgotten() -> None:
    runtime = Remembering()
    runtime.logits([1, 2, 3])
    runtime.fails = True
    with pytest.raises(RuntimeError, match="broke"):
        runtime.continuations([[4]], 2)
    assert runtime.length == 2
    with pytest.raises(RuntimeError, match="broke"):
        runtime.logits([4], 1)
    assert runtime.length == 1
