from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elmexport.evaluation.report.pareto import pareto_front

few_values = st.integers(0, 6).map(float)  # few, so that ties happen


@given(st.lists(st.tuples(few_values, few_values), max_size=12))
def test_the_front_is_what_no_point_dominates(points: list[tuple[float, float]]) -> None:
    def dominated(p: tuple[float, float]) -> bool:
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)

    front = pareto_front(points)
    assert sorted(front) == [i for i, p in enumerate(points) if not dominated(p)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
