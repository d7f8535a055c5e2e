"""Sizes by bisection, and an export that finds its own: what it reports is what an evaluation of the artifact finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.mixed import AccuracyDrop, smallest
from calibration.options import WeightOptions
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.evaluation.evaluate import Settings, evaluate
from elmexport.exporting import export_checkpoint
from elmexport.quantization.recipes import load_recipe
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint

SIZES = [4.3 + 0.2 * i for i in range(21)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def few_items(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of items, 80 unless a test asks for others, that the cloze task is cut to: all of them take minutes."""
    from elmexport.evaluation.tasks import documents

    whole, count = documents.build_documents, getattr(request, "param", 80)
    monkeypatch.setattr(documents, "build_documents", lambda suite, limit, seed: whole(suite, count, 0))
    return count


@pytest.mark.parametrize("count", [1, 2, 3, 21])
def test_the_smallest_that_passes(count: int) -> None:
    sizes = SIZES[:count]
    for first in range(count + 1):
        tried: list[float] = []

        def passes(size: float, first: int = first, tried: list[float] = tried) -> bool:
            tried.append(size)
            return sizes.index(size) >= first

        assert smallest(sizes, passes) == (sizes[first] if first < count else None)
        assert len(tried) == len(set(tried)) <= 7
        assert tried[0] == sizes[0]


def test_where_passing_is_luck_the_result_passed_and_the_one_before_did_not() -> None:
    lucky = {SIZES[3], SIZES[7], SIZES[8], SIZES[12], SIZES[15], SIZES[20]}
    found = smallest(SIZES, lambda size: size in lucky)
    assert found in lucky
    assert SIZES[SIZES.index(found) - 1] not in lucky


def test_a_model_without_a_tokenizer(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    mute = random_checkpoint(small_checkpoint.config)
    with pytest.raises(ElmExportError, match="has no tokenizer to read it with; pass one with --tokenizer PATH, or give a size"):
        export_checkpoint(mute, "onnx", out=tmp_path / "a", weights=WeightOptions(max_drop=1.0))
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("few_items", [8], indirect=True)
def test_a_drop_that_nothing_keeps_within(tiny: Checkpoint, few_items: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.mixed.smallest", lambda sizes, passes: None if not passes(sizes[-1]) else pytest.fail("passed"))
    monkeypatch.setattr("elmexport.evaluation.task_drop.AccuracyDrop", lambda task, items, *_: AccuracyDrop(task, items, 3.0, None, None))
    with pytest.raises(ElmExportError, match=r"--max-drop 1 is out of reach: .* \(\d\.\d\d bits each\) .* falls by 3\.00 points \(4 items"):
        export_checkpoint(tiny, "onnx", out=tmp_path / "a", weights=WeightOptions(max_drop=1.0))


@pytest.mark.slow
def test_the_reported_drop_is_that_of_the_artifact(tiny: Checkpoint, few_items: int, tmp_path: Path) -> None:
    out = tmp_path / "a"
    manifest = export_checkpoint(tiny, "onnx", out=out, weights=WeightOptions(max_drop=4.0)).manifest
    found = manifest.quant.allocation
    assert manifest.quant.name == load_recipe(out / "recipe.toml").name == "drop-4"
    assert found.max_drop == 4 and found.searched_items == found.items == few_items // 2
    chosen = next(trial for trial in found.trials if trial.bits_per_weight == pytest.approx(manifest.bits_per_weight, abs=1e-3))
    assert chosen.drop <= 4
    assert found.predicted_on != found.text
    assert found.trials[0].bits_per_weight == pytest.approx(4.3, abs=0.1)
    assert found.drop_interval[0] < found.drop < found.drop_interval[1]
    task = evaluate(out, Settings({"cloze": None}, text_tokens=0)).tasks["cloze"]
    assert task.comparison is not None and task.comparison.drop is not None
    # Of all items, half chose and half are reported. The engine rounds activations to 8 bits, which flips a few answers on top.
    assert task.comparison.drop == pytest.approx((chosen.drop + found.drop) / 2, abs=1.5)
