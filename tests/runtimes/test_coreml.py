"""Our Core ML packages through the MIL executor: the numbers of the reference, at every place of the cache, and its refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from numpy.typing import NDArray

from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.runtimes import open_artifact
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.coreml import CoreMLRuntime, open_runtime
from elmexport.runtimes.torch import TorchRuntime
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import kl, reference_logits
from tests.runtimes.mil.packages import function, write_package

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="on macOS Core ML itself runs the package, not the executor tested here")

CHUNK = 64


@pytest.fixture(scope="module")
def artifact(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> Path:
    return export_to(small_checkpoint, "coreml", "fp16")


@pytest.fixture(scope="module")
def ids(small_checkpoint: MemoryCheckpoint) -> NDArray[np.int64]:
    config = small_checkpoint.config
    return np.random.default_rng(0).integers(0, config.vocab_size, config.max_context_length)


@pytest.fixture(scope="module")
def expected(small_checkpoint: MemoryCheckpoint, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Independent float64 logits of the whole context."""
    return reference_logits(small_checkpoint.config, small_checkpoint.arrays, ids)


@pytest.fixture
def runtime(artifact: Path) -> Runtime:
    return open_artifact(artifact)


def test_sizes_come_from_the_package(runtime: Runtime, small_checkpoint: MemoryCheckpoint) -> None:
    assert isinstance(runtime, CoreMLRuntime)
    assert (runtime.vocab_size, runtime.context) == (small_checkpoint.config.vocab_size, small_checkpoint.config.max_context_length)
    assert runtime.chunk == CHUNK
    assert runtime.name == "mil executor"


def test_fp16_agrees_with_float64(runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    logits = runtime.logits(ids)
    assert logits.dtype == np.float32
    assert kl(expected, logits).max() < 1e-3


def test_without_rounding_only_the_weights_are_fp16(artifact: Path, small_checkpoint: MemoryCheckpoint, ids: NDArray[np.int64]) -> None:
    halves = {name: array.astype(np.float16).astype(np.float32) for name, array in small_checkpoint.arrays.items()}
    logits = open_runtime(artifact, precision="fp32").logits(ids[:70])
    expected = reference_logits(small_checkpoint.config, halves, ids[:70])
    assert kl(expected, logits).max() < 2e-6  # what is left: RoPE tables in fp16


@pytest.mark.parametrize(("quant", "limit"), [("fp16", 1e-3), ("int8", 0.01), ("lut8", 0.01), ("lut6", 0.02), ("lut4", 0.2)])
def test_tiny_agrees_with_torch(tiny: Checkpoint, export_to: ExportTo, quant: str, limit: float) -> None:
    ids = np.random.default_rng(0).integers(0, tiny.config.vocab_size, 100)
    logits = open_artifact(export_to(tiny, "coreml", quant)).logits(ids)
    assert kl(TorchRuntime(tiny).logits(ids), logits).mean() < limit


@pytest.mark.parametrize("start", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK, -CHUNK, -2, -1])
def test_prefill_and_decode_equal_the_full_forward(
    start: int, runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64]
) -> None:
    """A prefix, then tokens one by one up to a few further or the end."""
    start %= len(ids)
    if start:
        assert kl(expected[:start], runtime.logits(ids[:start])).max() < 1e-3
    for position in range(start, min(start + 3, len(ids))):
        assert kl(expected[position : position + 1], runtime.logits(ids[position : position + 1], position)).max() < 1e-3


@pytest.mark.parametrize("length", [1, 2, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("start", [0, 40, -CHUNK - 1, -CHUNK - 2])
def test_chunks_anywhere_equal_the_full_forward(
    start: int, length: int, runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64]
) -> None:
    """Also where a padded chunk would reach beyond the cache."""
    start %= len(ids)
    if start:
        runtime.logits(ids[:start])
    assert kl(expected[start : start + length], runtime.logits(ids[start : start + length], start)).max() < 1e-3


def test_last(runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    """Within the last chunk, all of it, and more than it."""
    for last in (1, 100 - CHUNK, 50):
        logits = runtime.logits(ids[:100], last=last)
        assert logits.shape == (last, runtime.vocab_size)
        assert kl(expected[100 - last : 100], logits).max() < 1e-3


def test_going_back_forgets(runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    runtime.logits(np.concatenate([ids[:10], ids[200:230]]))
    assert kl(expected[10:20], runtime.logits(ids[10:20], 10)).max() < 1e-3
    assert kl(expected[:5], runtime.logits(ids[:5])).max() < 1e-3


def test_position_past_the_end(runtime: Runtime, ids: NDArray[np.int64]) -> None:
    runtime.logits(ids)
    with pytest.raises(ElmExportError, match=f"need a context of {len(ids) + 1}; this artifact holds {len(ids)}"):
        runtime.logits([1], len(ids))


def test_the_bare_package(artifact: Path, ids: NDArray[np.int64], runtime: Runtime) -> None:
    (package,) = artifact.glob("*.mlpackage")
    np.testing.assert_array_equal(open_artifact(package).logits(ids[:5]), runtime.logits(ids[:5]))


def test_a_package_of_another_kind(tmp_path: Path) -> None:
    made = function({"x": mb.TensorSpec((1, 4), dtype=types.fp16)}, lambda x: mb.relu(x=x))
    package = write_package(tmp_path / "other.mlpackage", {"main": made})
    with pytest.raises(
        ElmExportError, match=r"its functions are main, not prefill and decode\); run it with elmexport\.runtimes\.mil directly"
    ):
        open_runtime(package)


def test_a_package_with_other_inputs(tmp_path: Path) -> None:
    made = {name: function({"x": mb.TensorSpec((1, 4), dtype=types.fp16)}, lambda x: mb.relu(x=x)) for name in ("prefill", "decode")}
    with pytest.raises(ElmExportError, match="inputs of decode are x, not input_ids, position"):
        open_runtime(write_package(tmp_path / "other.mlpackage", made))


def test_no_package(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"should hold one \.mlpackage, and holds none; give the package itself"):
        open_runtime(tmp_path)
