"""What may be measured, and what a context leaves of it."""

from __future__ import annotations

import pytest

from elmexport.bench.workload import Workload
from elmexport.errors import ElmExportError


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (Workload(prompts=(), depths=()), "nothing to measure"),
        (Workload(prompts=(128, 0)), "--prompt is 0; it must be 1 or more"),
        (Workload(depths=(-1,)), "--depth is -1; it must be 0 or more"),
        (Workload(generate=0), "--generate is 0; it must be 1 or more"),
        (Workload(prompts=(128, 64, 128)), "--prompt names 128 twice"),
        (Workload(depths=(5, 5)), "--depth names 5 twice"),
    ],
)
def test_what_makes_no_sense(workload: Workload, message: str) -> None:
    with pytest.raises(ElmExportError, match=message):
        workload.check()


def test_the_ends_of_a_context() -> None:
    Workload((100,), (36,), 64).check_context("a", 100)
    with pytest.raises(ElmExportError, match=r"a prompt of 101 tokens does not fit a, whose context is 100; .*--context 101"):
        Workload((100, 101), (), 64).check_context("a", 100)
    with pytest.raises(ElmExportError, match=r"64 tokens at depth 37 need a context of 101, and that of a is 100; .*--context 101"):
        Workload((), (0, 37), 64).check_context("a", 100)


@pytest.mark.parametrize(
    ("context", "fitted"),
    [
        (2048, Workload()),
        (1087, Workload((128, 512), (0,), 64)),
        (256, Workload((128,), (0,), 64)),
        (100, Workload((100,), (0,), 64)),
        (10, Workload((10,), (0,), 10)),
    ],
)
def test_fitted(context: int, fitted: Workload) -> None:
    assert Workload().fitted(context) == fitted
    fitted.check_context("a", context)


def test_what_was_not_asked_for_is_not_fitted() -> None:
    assert Workload(prompts=()).fitted(10).prompts == ()
    assert Workload(depths=()).fitted(10).depths == ()


def test_only_the_parts_that_are_named() -> None:
    assert Workload((128, 512), (0, 100), 64).fitted(128, ["prompts"]) == Workload((128,), (0, 100), 64)
    assert Workload((128, 512), (0, 100), 64).fitted(128, ["depths"]) == Workload((128, 512), (0,), 64)
    assert Workload().fitted(10, []) == Workload()
