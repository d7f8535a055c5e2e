"""What is timed, on a runtime whose calls take known times by a clock of its own."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from elmexport.bench.measure import measure
from elmexport.bench.workload import Workload
from elmexport.runtimes.base import Runtime


class TimedRuntime(Runtime):
    """A call of n tokens at position p takes 1 + 10 n + 100 p seconds; the first call of a length takes a million more."""

    name, vocab_size, context = "timed", 50, 200

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.calls: list[tuple[int, int]] = []

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        if len(ids) not in [count for count, _ in self.calls]:
            self.now += 1e6
        self.calls.append((len(ids), position))
        self.now += 1 + 10 * len(ids) + 100 * position
        return np.zeros((last, self.vocab_size), np.float32)


def test_what_is_timed() -> None:
    runtime = TimedRuntime()
    found = measure(runtime, Workload((7, 20), (0, 30), 4), lambda: runtime.now)
    assert found.prefill_s == {7: 71, 20: 201}
    # Four calls of one token each, at their positions; filling the cache is not in it.
    assert found.decode_s == {0: 4 * 11 + 100 * (0 + 1 + 2 + 3), 30: 4 * 11 + 100 * (30 + 31 + 32 + 33)}
    assert runtime.calls == [
        (7, 0),
        (20, 0),
        (1, 0),
        (7, 0),
        (20, 0),
        *((1, p) for p in range(4)),
        (30, 0),
        *((1, p) for p in range(30, 34)),
    ]


@pytest.mark.parametrize("workload", [Workload((200,), (), 1), Workload((), (0, 199), 1)])
def test_to_the_end_of_the_context(workload: Workload) -> None:
    found = measure(TimedRuntime(), workload)
    assert (tuple(found.prefill_s), tuple(found.decode_s)) == (workload.prompts, workload.depths)
