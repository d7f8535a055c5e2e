"""Dependencies: references first, one maker of shared weights at a time, and what follows where one fails."""

from __future__ import annotations

from elmexport.sweep.jobs import Job, Kind, State
from elmexport.sweep.order import Order
from tests.sweep.conftest import MakeJob


def keys(jobs: list[Job]) -> list[str]:
    return [job.key for job in jobs]


def test_cells_wait_for_their_reference(make_job: MakeJob) -> None:
    jobs = [make_job("ref", kind=Kind.REFERENCE), make_job("a", after="ref"), make_job("b", after="ref"), make_job("alone")]
    order = Order(jobs)
    assert keys(order.ready()) == ["ref", "alone"] and order.ready() == []
    assert order.ended("ref", State.DONE) == []
    assert keys(order.ready()) == ["a", "b"]


def test_cells_are_not_run_where_the_reference_failed(make_job: MakeJob) -> None:
    order = Order([make_job("ref", kind=Kind.REFERENCE), make_job("a", after="ref"), make_job("b")])
    assert keys(order.ready()) == ["ref", "b"]
    assert keys(order.ended("ref", State.FAILED)) == ["a"]
    assert order.ready() == []


def test_one_goes_first_and_the_others_find_what_it_made(make_job: MakeJob) -> None:
    order = Order([make_job(key, groups=["codes"]) for key in "abc"] + [make_job("other", groups=["other codes"])])
    assert keys(order.ready()) == ["a", "other"]
    order.ended("other", State.DONE)
    assert order.ready() == []
    order.ended("a", State.DONE)
    assert keys(order.ready()) == ["b", "c"]


def test_the_next_one_tries_where_the_first_failed(make_job: MakeJob) -> None:
    order = Order([make_job(key, groups=["codes"]) for key in "abc"])
    for first, then in (("a", "b"), ("b", "c")):
        assert keys(order.ready()) == [first]
        assert order.ended(first, State.CRASHED) == []
        assert then not in keys([])
    assert keys(order.ready()) == ["c"]


def test_groups_that_overlap(make_job: MakeJob) -> None:
    """Two weight sets from the same statistics: the second waits for the statistics, not for the first's codes."""
    order = Order([make_job("a", groups=["codes 1", "statistics"]), make_job("b", groups=["codes 2", "statistics"]), make_job("c", groups=["codes 2"])])  # fmt: skip
    assert keys(order.ready()) == ["a", "c"]
    order.ended("a", State.DONE)
    assert order.ready() == []  # b waits for c, which makes the same codes
    order.ended("c", State.DONE)
    assert keys(order.ready()) == ["b"]


def test_what_an_earlier_run_finished(make_job: MakeJob) -> None:
    jobs = [make_job("ref", kind=Kind.REFERENCE), *(make_job(key, after="ref", groups=["codes"]) for key in "abc")]
    assert keys(Order(jobs, done={"ref", "a"}).ready()) == ["b", "c"]
    assert keys(Order(jobs, done={"ref"}).ready()) == ["a"]
