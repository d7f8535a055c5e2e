"""Statistics files: what is written comes back, is mapped and not read, belongs to one model, and damage is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from calibration.collect import collect
from calibration.statistics import METADATA_KEY, Statistics, load_statistics
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.models.openelm.config import OpenELMConfig
from tests.calibration.test_collect import sample_of
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint


@pytest.fixture(scope="module")
def statistics(small_checkpoint: MemoryCheckpoint) -> Statistics:
    return collect(small_checkpoint, sample_of(small_checkpoint.config), hessian=True)


@pytest.fixture
def path(statistics: Statistics, tmp_path: Path) -> Path:
    statistics.save(tmp_path / "statistics.safetensors")
    return tmp_path / "statistics.safetensors"


def test_round_trip(statistics: Statistics, path: Path, small_checkpoint: MemoryCheckpoint) -> None:
    found = load_statistics(path, small_checkpoint)
    assert found.facts == statistics.facts
    assert set(found.tensors) == set(statistics.tensors)
    for name, tensor in statistics.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    spec = small_checkpoint.specs["transformer.layers.1.ffn.proj_2.weight"]
    moments = found.moments(spec)
    assert moments is not None and moments.hessian is not None and moments.hessian.shape == (spec.shape[1],) * 2


def test_the_safetensors_library_reads_it(statistics: Statistics, path: Path) -> None:
    tensors = load_file(path)
    assert set(tensors) == set(statistics.tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in statistics.tensors.items())
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[METADATA_KEY])
    assert (facts["model"], facts["tokens"], facts["window"], facts["text"]) == ("small", 120, 24, "random ids")


def test_another_model(path: Path, small_config: OpenELMConfig, tiny: Checkpoint) -> None:
    for other in (tiny, random_checkpoint(small_config, seed=1)):
        with pytest.raises(ElmExportError, match=f"statistics of another model: small.*while {other.source.name} has"):
            load_statistics(path, other)


def test_truncated(path: Path) -> None:
    content = path.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ElmExportError, match="truncated or damaged"):
            Statistics.load(path)


def _another_kind(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)


def _newer(path: Path) -> None:
    _rewrite(path, lambda facts: facts | {"format": 99})


def _no_window(path: Path) -> None:
    _rewrite(path, lambda facts: {key: value for key, value in facts.items() if key != "window"})


def _infinite_peak(path: Path) -> None:
    _rewrite(path, lambda facts: facts | {"residual_peaks": [float("inf")]})


def _lacks_a_tensor(path: Path) -> None:
    _rewrite(path, lambda facts: facts, drop="layers.2.swiglu.hessian")


def _rewrite(path: Path, change: Callable[[dict], dict], drop: str = "") -> None:  # type: ignore[type-arg]
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[METADATA_KEY])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(change(facts))})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_another_kind, "holds no calibration statistics"),
        (_newer, "format 99, this version reads up to 1; update elmexport"),
        (_no_window, "its metadata lacks window; calibrate again"),
        (_infinite_peak, "its metadata is not JSON"),
        (_lacks_a_tensor, "lacks layers.2.swiglu.hessian"),
    ],
)
def test_damage(path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(path)
    with pytest.raises(ElmExportError, match=message):
        Statistics.load(path)


def test_values_that_are_not_finite(path: Path, small_checkpoint: MemoryCheckpoint) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["layers.0.attn_norm.mean_square"][3] = float("nan")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ElmExportError, match=r"layers\.0\.attn_norm\.mean_square holds NaN"):
        Statistics.load(path).moments(small_checkpoint.specs["transformer.layers.0.attn.qkv_proj.weight"])


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"cannot read .*nowhere: No such file"):
        Statistics.load(tmp_path / "nowhere")
    with pytest.raises(ElmExportError, match=r"cannot read|truncated or damaged"):
        Statistics.load(tmp_path)


def test_outliers(statistics: Statistics, small_checkpoint: MemoryCheckpoint) -> None:
    found = statistics.outliers()
    assert len(found) == 4 * 3 + 1
    assert [ratio for _, ratio in found] == sorted((ratio for _, ratio in found), reverse=True)
    moments = statistics.moments(small_checkpoint.specs[found[0][0]])
    assert moments is not None
    square = moments.mean_square.double()
    assert found[0][1] == pytest.approx(float((square.max() / square.mean()).sqrt()))
