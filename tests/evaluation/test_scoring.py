from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError, VerificationError
from elmexport.evaluation.scoring import Request, score
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.torch import TorchRuntime
from tests.reference import log_probs


class Counting(TorchRuntime):
    """Counts the tokens that it is made to read."""

    read = 0

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        self.read += len(ids)
        return super()._forward(ids, position, last)


@pytest.fixture(scope="module")
def runtime(tiny: Checkpoint) -> Counting:
    return Counting(tiny)


def alone(runtime: Runtime, request: Request) -> float:
    """The definition: one pass over everything, nothing shared."""
    ids = [*request.context, *request.continuation][-(runtime.context + 1) :]
    rows = log_probs(runtime.logits(ids[:-1]))[-len(request.continuation) :]
    return float(sum(row[token] for row, token in zip(rows, request.continuation, strict=True)))


def draw(seed: int, *lengths: int) -> list[int]:
    return [int(i) for i in np.random.Generator(np.random.PCG64(seed)).integers(3, 4096, sum(lengths))]


@pytest.mark.slow
def test_shared_and_batched_requests_score_as_if_each_were_alone(runtime: Counting) -> None:
    context, other = draw(0, 40), draw(1, 12)
    requests = [
        *(Request(context, draw(seed, seed)) for seed in range(1, 6)),  # choices of one question, of several lengths
        *(Request([*context, *draw(seed, 3)], draw(9, 4)) for seed in range(10, 13)),  # contexts that part near the end
        Request(other, draw(20, 1)),
        Request(other, draw(21, 1)),
        Request(other[:1], draw(22, 300)[:200]),
        Request(draw(23, 400), draw(24, 5)),  # longer than the context of 256
        Request(context, draw(1, 1)),  # the same again
    ]
    found = dict(score(runtime, requests))
    assert sorted(found) == list(range(len(requests)))
    for index, request in enumerate(requests):
        assert found[index].loglikelihood == pytest.approx(alone(runtime, request), abs=2e-4), index


def test_a_shared_context_is_read_once(runtime: Counting) -> None:
    context = draw(0, 100)
    runtime.read = 0
    list(score(runtime, [Request(context, draw(seed, 3)) for seed in range(4)]))
    assert runtime.read <= 100 + 4 * 3


def test_few_shot_examples_are_read_once(runtime: Counting) -> None:
    examples = draw(0, 150)
    runtime.read = 0
    list(score(runtime, [Request([*examples, *draw(seed, 30)], [letter]) for seed in range(1, 6) for letter in (5, 6, 7, 8)]))
    assert runtime.read <= 150 + 5 * 32


@pytest.mark.slow
def test_scores_do_not_depend_on_what_is_answered_already(runtime: Counting) -> None:
    examples = draw(0, 60)
    requests = [
        *(Request([*examples, *draw(seed, 20), *draw(0, 3)], draw(seed + letter, 2)) for seed in range(1, 5) for letter in range(4)),
        *(Request([*examples[:40], *draw(seed, 9)], draw(seed, 30)) for seed in range(5, 8)),  # a single one, or few: another grouping
        Request(draw(30, 5), draw(31, 1)),
    ]
    undisturbed = list(score(runtime, requests))
    order = [index for index, _ in undisturbed]
    for count in range(len(order) + 1):  # answered before an interruption
        runtime.read = 0
        assert list(score(runtime, requests, set(order[:count]).__contains__)) == undisturbed[count:]
    assert runtime.read == 0, "all is answered, and yet something was read"
    rng = np.random.default_rng(0)
    for _ in range(10):  # by a smaller evaluation
        known = {index for index in order if rng.random() < 0.7}
        assert list(score(runtime, requests, known.__contains__)) == [found for found in undisturbed if found[0] not in known]


def test_greedy_is_whether_every_token_was_the_likeliest(runtime: Counting) -> None:
    context = draw(3, 10)
    best: list[int] = []
    for _ in range(3):
        best.append(int(runtime.logits([*context, *best])[-1].argmax()))
    (_, right), (_, wrong) = sorted(score(runtime, [Request(context, best), Request(context, [*best[:2], best[2] ^ 1])]))
    assert (right.greedy, wrong.greedy) == (True, False)


def test_what_cannot_be_scored(runtime: Counting) -> None:
    with pytest.raises(ElmExportError, match="a context and a continuation"):
        list(score(runtime, [Request([], [1])]))
    with pytest.raises(ElmExportError, match="a continuation has 257 tokens, this artifact holds 256"):
        list(score(runtime, [Request([1], [1] * 257)]))


def test_logits_that_are_not_finite(tiny: Checkpoint) -> None:
    class Broken(TorchRuntime):
        def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
            return super()._forward(ids, position, last) * np.float32("nan")

    with pytest.raises(VerificationError, match="not finite"):
        list(score(Broken(tiny), [Request([1, 2], [3])]))
