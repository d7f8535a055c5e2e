from __future__ import annotations

import msgspec
import pytest

from elmexport.evaluation.report.worst import unit, worst_items
from elmexport.evaluation.results import Item, ItemScores, TaskResult
from tests.evaluation.report import examples


def item(
    id_: int, before: tuple[float, ...], after: tuple[float, ...], *, was: float = 1.0, now: float = 1.0, target: int | None = 0
) -> Item:
    return Item(id_, "h", {"acc": now}, after, "text", tuple(["ab", "cd", "efghi"][: len(after)]), target, ItemScores({"acc": was}, before))


def task(*items: Item, metric: str = "acc", higher_is_better: bool = True) -> TaskResult:
    return TaskResult({metric: 0.5}, len(items), 0, metric, higher_is_better, {}, items)


def test_flips_come_first_then_what_lost_most_margin() -> None:
    found = worst_items(
        task(
            item(1, (-1.0, -2.0), (-1.0, -1.9)),  # loses 0.1
            item(2, (-1.0, -9.0), (-1.0, -2.0)),  # loses 7, still right
            item(3, (-1.0, -2.0), (-2.0, -1.5), now=0.0),  # flips, loses 1.5
            item(4, (-1.0, -2.0), (-1.0, -3.0)),  # gains
            item(5, (-1.0, -2.0), (-9.0, -1.0), now=0.0),  # flips, loses 9
        ),
        10,
    )
    assert [loss.item.id for loss in found] == [5, 3, 2, 1]
    assert [loss.flipped for loss in found] == [True, True, False, False]
    assert [loss.amount for loss in found] == pytest.approx([9.0, 1.5, 7.0, 0.1])


def test_the_margin_is_to_the_best_wrong_choice() -> None:
    (loss,) = worst_items(task(item(1, (-5.0, -3.0, -4.0), (-5.0, -3.0, -1.0), was=0.0, now=0.0)), 1)
    assert (loss.before, loss.after) == (-2.0, -4.0)


def test_acc_norm_compares_scores_per_character() -> None:
    entry = msgspec.structs.replace(
        item(1, (-2.0, -4.0, -10.0), (-2.0, -1.0, -10.0)),
        metrics={"acc_norm": 0.0},
        reference=ItemScores({"acc_norm": 1.0}, (-2.0, -4.0, -10.0)),
    )
    (loss,) = worst_items(task(entry, metric="acc_norm"), 1)
    assert entry.choices == ("ab", "cd", "efghi")
    assert (loss.before, loss.after, loss.flipped) == (-1.0 - -2.0, -1.0 - -0.5, True)
    assert unit("acc_norm") == "nats per character"


@pytest.mark.parametrize(
    "entry",
    [
        item(1, (-1.0, -2.0), (-9.0, -1.0), target=None),
        item(1, (-1.0, -2.0), (-9.0, -1.0), was=0.7, now=0.2),  # a share of probability, as truthfulqa_mc2's
        item(1, (-1.0,), (-9.0,)),  # one score: no margin
        msgspec.structs.replace(item(1, (-1.0, -2.0), (-9.0, -1.0)), reference=None),
    ],
)
def test_items_without_one_right_choice_are_left_out(entry: Item) -> None:
    assert worst_items(task(entry), 5) == []


def test_a_metric_of_which_less_is_better_has_no_right_choice() -> None:
    assert worst_items(task(item(1, (-1.0, -2.0), (-9.0, -1.0), now=0.0), higher_is_better=False), 5) == []


def test_flips_agree_with_the_count_of_the_comparison() -> None:
    for found in examples.report().tasks.values():
        if found.higher_is_better:
            assert found.comparison is not None and found.comparison.flips is not None
            assert sum(loss.flipped for loss in worst_items(found, found.n)) == found.comparison.flips.right_to_wrong
