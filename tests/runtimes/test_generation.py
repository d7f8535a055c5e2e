"""Generation on a scripted runtime: what is fed, what comes out, and why it ends."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.generation import Generation, generate
from elmexport.runtimes.sampler import Sampling

EOS = 2


class Counting(Runtime):
    """Says token + 1 after any token; remembers what it was fed."""

    name = "counting"

    def __init__(self, context: int = 100) -> None:
        super().__init__()
        self.vocab_size, self.context = 50, context
        self.fed: list[tuple[list[int], int]] = []

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        self.fed.append((ids.tolist(), position))
        assert last == 1
        logits = np.zeros((1, self.vocab_size), np.float32)
        logits[0, (ids[-1] + 1) % self.vocab_size] = 5
        return logits


def run(runtime: Runtime, ids: list[int], max_tokens: int, sampling: Sampling | None = None) -> Generation:
    return generate(runtime, ids, max_tokens=max_tokens, sampling=sampling or Sampling(), eos_ids=(EOS,))


def test_feeds_the_prompt_once_and_then_each_token() -> None:
    runtime = Counting()
    generation = run(runtime, [1, 10, 20], 3)
    assert list(generation) == [21, 22, 23]
    assert runtime.fed == [([1, 10, 20], 0), ([21], 3), ([22], 4)]
    assert generation.stop == "max tokens"


def test_streams() -> None:
    runtime = Counting()
    generation = run(runtime, [5], 3)
    assert runtime.fed == []
    next(generation)
    assert len(runtime.fed) == 1
    assert generation.stop is None


def test_end_of_text_is_not_given() -> None:
    generation = run(Counting(), [49], 10)
    assert list(generation) == [0, 1]
    assert generation.stop == "end of text"
    assert list(generation) == []


def test_a_model_without_end_of_text() -> None:
    assert list(generate(Counting(), [0], max_tokens=4, sampling=Sampling(), eos_ids=())) == [1, 2, 3, 4]


def test_stops_when_the_context_is_full() -> None:
    runtime = Counting(context=5)
    generation = run(runtime, [1, 10, 20], 10)
    assert list(generation) == [21, 22, 23]  # two of them are in the cache, the last one needs no room
    assert runtime.length == 5
    assert generation.stop == "context full"


def test_a_prompt_that_fills_the_context_still_gives_one_token() -> None:
    generation = run(Counting(context=3), [1, 10, 20], 10)
    assert list(generation) == [21]
    assert generation.stop == "context full"


def test_the_number_asked_for_is_not_a_full_context() -> None:
    generation = run(Counting(context=3), [1, 10, 20], 1)
    assert list(generation) == [21]
    assert generation.stop == "max tokens"


def test_a_prompt_longer_than_the_context() -> None:
    with pytest.raises(ElmExportError, match="need a context of 4; this artifact holds 3"):
        list(run(Counting(context=3), [1, 2, 3, 4], 1))


def test_no_prompt() -> None:
    with pytest.raises(ElmExportError, match="no token ids"):
        list(run(Counting(), [], 1))


def test_max_tokens_below_one() -> None:
    with pytest.raises(ElmExportError, match="max-tokens is 0; it must be 1 or above"):
        run(Counting(), [1], 0)


def test_samples_with_the_seed() -> None:
    texts = [list(run(Counting(), [1], 20, Sampling(5.0, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
