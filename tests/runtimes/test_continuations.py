"""`Runtime.continuations` of every engine: what one pass after another gives, and what the independent float64 forward pass gives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from elmexport.checkpoint.save import save_checkpoint
from elmexport.errors import ElmExportError
from elmexport.runtimes import batching, open_artifact
from elmexport.runtimes import coreml as coreml_module
from elmexport.runtimes import llama_cpp as llama_cpp_module
from elmexport.runtimes.base import Runtime
from tests.conftest import SmallArtifact
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import kl, log_probs, reference_logits

CONTEXT = 128

# Engine and quantization: largest difference of log-probabilities between a batch and one pass after another, and from float64.
EXACT = {
    "torch fp32": (3e-5, 1e-4),
    "onnx fp32": (3e-5, 1e-4),
    "gguf fp32": (3e-5, 1e-4),
    "mlx bf16": (5e-5, 0.2),  # bf16 are the weights; on a GPU the activations too
    "coreml fp32": (3e-5, 1e-2),  # fp16 are the weights and the RoPE tables
}
# Largest KL divergence, nats: fp16 rounding, and activations that are rounded to 8 bits by the engine, amplify the order of sums.
NEAR = {"coreml fp16": 1e-4, "onnx int4": 0.02, "gguf int4": 0.02}

LENGTHS: dict[str, Sequence[int]] = {
    "choices": [3, 1, 4, 2],
    "single tokens": [1, 1, 1],
    "very different": [1, 30, 2, 17, 1],
    "more than a batch": [2, 3] * 20,
}
# Where they begin: all at the beginning and at a chunk's end, of those that take long one, the most uneven ones also between.
PLACES = [
    *((position, name) for position in (0, 64) for name in LENGTHS if position or name != "more than a batch"),
    *((position, "very different") for position in (1, 90)),
]


@pytest.fixture(scope="module")
def ids(small_checkpoint: MemoryCheckpoint) -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(0, small_checkpoint.config.vocab_size, CONTEXT)


Opened = Callable[[str], Runtime]


@pytest.fixture(scope="module")
def opened(small_checkpoint: MemoryCheckpoint, small_artifact: SmallArtifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    done: dict[str, Runtime] = {}

    def open_it(name: str) -> Runtime:
        target, quant = name.split()
        if target == "torch":
            folder = tmp_path_factory.mktemp("checkpoint") / "model"
            arrays = {key: torch.from_numpy(array) for key, array in small_checkpoint.arrays.items()}
            save_checkpoint(folder, small_checkpoint.config, arrays)
            return open_artifact(folder)
        if target == "coreml":
            if sys.platform == "darwin":
                pytest.skip("on macOS Core ML itself runs the package, which has no batches")
            return coreml_module.open_runtime(small_artifact(target, "fp16"), precision="fp32" if quant == "fp32" else "fp16")
        return open_artifact(small_artifact(target, quant))

    def call(name: str) -> Runtime:
        if name not in done:
            done[name] = open_it(name)
        return done[name]

    yield call
    for runtime in done.values():
        runtime.close()


def random_continuations(lengths: Sequence[int]) -> list[NDArray[np.int64]]:
    generator = np.random.default_rng(sum(lengths))
    return [generator.integers(0, 512, length) for length in lengths]


def one_by_one(runtime: Runtime, prefix: NDArray[np.int64], continuations: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
    rows = []
    for continuation in continuations:
        if len(prefix):
            runtime.logits(prefix)
        rows.append(runtime.logits(continuation, len(prefix)))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("position", "lengths"), [pytest.param(place, LENGTHS[name], id=f"{place}-{name}") for place, name in PLACES])
@pytest.mark.parametrize("name", [*EXACT, *NEAR])
def test_equal_one_after_another(opened: Opened, ids: NDArray[np.int64], name: str, position: int, lengths: Sequence[int]) -> None:
    runtime = opened(name)
    continuations = random_continuations(lengths)
    expected = one_by_one(runtime, ids[:position], continuations)
    if position:
        runtime.logits(ids[:position])
    found = runtime.continuations(continuations, position)
    assert runtime.length == position
    assert [row.shape for row in found] == [(length, 512) for length in lengths]
    for row, alone in zip(found, expected, strict=True):
        assert row.dtype == np.float32
        if name in EXACT:
            assert np.abs(log_probs(row) - log_probs(alone)).max() < EXACT[name][0]
        else:
            assert kl(alone, row).max() < NEAR[name]


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 64, 120])
@pytest.mark.parametrize("name", EXACT)
def test_equal_float64(opened: Opened, small_checkpoint: MemoryCheckpoint, ids: NDArray[np.int64], name: str, position: int) -> None:
    """To the very end of the context, and after the cache has held something longer."""
    runtime = opened(name)
    lengths = [CONTEXT - position, 1, 7]
    continuations = random_continuations(lengths)
    runtime.logits(ids)
    arrays = small_checkpoint.arrays
    if name.startswith("coreml"):  # its weights are fp16
        arrays = {key: array.astype(np.float16).astype(np.float32) for key, array in arrays.items()}
    for row, continuation in zip(runtime.continuations(continuations, position), continuations, strict=True):
        whole = np.concatenate([ids[:position], continuation])
        expected = reference_logits(small_checkpoint.config, arrays, whole)[position:]
        assert np.abs(log_probs(row) - log_probs(expected)).max() < EXACT[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXACT, "onnx int4", "gguf int4"])
def test_the_cache_holds_the_prefix_alone(opened: Opened, small_checkpoint: MemoryCheckpoint, ids: NDArray[np.int64], name: str) -> None:
    """What is fed next does not see the continuations."""
    runtime = opened(name)
    expected = runtime.logits(ids)
    for lengths in ([3, 1, 1, 2, 1], [9, 4]):
        runtime.logits(ids)
        runtime.continuations(random_continuations(lengths), 40)
        assert runtime.length == 40
        with pytest.raises(ElmExportError, match="position is 41, but the cache holds 40 tokens"):
            runtime.logits([1], 41)
        found = runtime.logits(ids[40:60], 40)
        assert kl(expected[40:60], found).max() < (0.02 if "int4" in name else 1e-8)


@pytest.mark.parametrize("name", EXACT)
def test_small_batches(opened: Opened, ids: NDArray[np.int64], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a few tokens only: several batches, and a continuation that is longer than one."""
    runtime = opened(name)
    continuations = random_continuations([2, 3, 20, 1, 5, 4, 4])
    expected = one_by_one(runtime, ids[:10], continuations)
    monkeypatch.setattr(llama_cpp_module, "BATCH", 12)
    monkeypatch.setattr(batching, "TOKENS", 12)
    for row, alone in zip(runtime.continuations(continuations, 10), expected, strict=True):
        assert np.abs(log_probs(row) - log_probs(alone)).max() < EXACT[name][0]


@pytest.mark.parametrize("name", EXACT)
def test_refused(opened: Opened, ids: NDArray[np.int64], name: str) -> None:
    runtime = opened(name)
    runtime.logits(ids[:20])
    with pytest.raises(ElmExportError, match="position is 120, but the cache holds 20"):
        runtime.continuations([[1]], 120)
    with pytest.raises(ElmExportError, match="109 tokens at position 20 need a context of 129"):
        runtime.continuations([[1], [1] * 109], 20)
    with pytest.raises(ElmExportError, match="token id 512 is outside the vocabulary"):
        runtime.continuations([[1], [512]], 20)
    with pytest.raises(ElmExportError, match="no token ids"):
        runtime.continuations([[1], []], 20)
    assert runtime.length == 20


@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_a_closed_runtime_says_so(small_artifact: SmallArtifact, target: str) -> None:
    runtime = open_artifact(small_artifact(target, "int4"))
    runtime.logits([1, 2, 3])
    runtime.close()
    for position in (2, 0):
        with pytest.raises(ElmExportError, match="closed"):
            runtime.continuations([[1], [2], [3]], position)


def test_batches_keep_their_bounds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = generator.integers(1, 60, generator.integers(0, 40)).tolist()
        groups = list(batching.batches(lengths, rows=7, tokens=100, padding=10))
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        for group in groups:
            members = [lengths[index] for index in group]
            assert members == sorted(members, reverse=True)
            assert len(group) <= 7
            assert len(group) * members[0] <= 100 or len(group) == 1
            assert members[0] - members[-1] <= 10


def test_batches_are_no_smaller_than_needed() -> None:
    assert list(batching.batches([4, 4, 4, 4], tokens=12)) == [[0, 1, 2], [3]]
    assert list(batching.batches([1, 40, 3], padding=10)) == [[1], [2, 0]]
    assert list(batching.batches([600, 1])) == [[0], [1]]
