"""Sensitivities are measured once for a model, a text and a choice of schemes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from calibration import costs
from calibration.collect import collect
from calibration.costs import known_sensitivities
from calibration.sensitivity import KLEvaluator, Sensitivity
from calibration.text import Sample
from elmexport.errors import ElmExportError
from elmexport.progress import SilentProgress
from elmexport.quantization.schemes import Integer, find_scheme
from tests.memory_checkpoint import MemoryCheckpoint

NAMES = ("transformer.layers.2.ffn.proj_2.weight", "transformer.token_embeddings.weight")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sensitivities"


def measure(checkpoint: MemoryCheckpoint, schemes: tuple[str, ...] = ("int4-block32", "int8-block32"), seed: int = 0) -> list[Sensitivity]:
    sample = Sample(np.random.default_rng(seed).integers(0, checkpoint.config.vocab_size, (2, 32)), "random")
    kinds = tuple(scheme for name in schemes if isinstance(scheme := find_scheme(name), Integer))
    weighting = Sample(np.random.default_rng(99).integers(0, checkpoint.config.vocab_size, (1, 32)), "random")
    evaluator = KLEvaluator(checkpoint, sample)
    weigh = partial(collect, checkpoint, weighting)
    return known_sensitivities(checkpoint, dict.fromkeys(NAMES, kinds), weighting, weigh, sample, evaluator, SilentProgress())


@pytest.mark.slow
def test_measured_once(small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(small_checkpoint)
    assert sorted(item.spec.name for item in first) == sorted(NAMES)
    assert all(0 < item.kl[find_scheme("int8-block32")] < item.kl[find_scheme("int4-block32")] for item in first)  # type: ignore[index]

    def again(*_: object) -> None:
        pytest.fail("measured again")

    monkeypatch.setattr(costs, "sensitivities", again)
    assert measure(small_checkpoint) == first


@pytest.mark.slow
def test_another_text_or_choice_is_another_measurement(small_checkpoint: MemoryCheckpoint, cache: Path) -> None:
    first = measure(small_checkpoint)
    assert measure(small_checkpoint, seed=1) != first
    measure(small_checkpoint, ("int4-block96", "int8-block32"))
    assert len(list(cache.iterdir())) == 3


@pytest.mark.slow
def test_a_damaged_file_is_measured_again(small_checkpoint: MemoryCheckpoint, cache: Path) -> None:
    first = measure(small_checkpoint)
    (path,) = cache.iterdir()
    for damaged in ("", "[]", "{}", path.read_text().replace("int8-block32", "int9")):
        path.write_text(damaged)
        assert measure(small_checkpoint) == first
        assert path.read_text() != damaged


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(small_checkpoint: MemoryCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ElmExportError, match=r"cannot write .*ELMEXPORT_CACHE"):
        measure(small_checkpoint)
