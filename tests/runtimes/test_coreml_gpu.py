"""Our Core ML packages for GPUs through the MIL executor: the reference's numbers at every place of the cache, whatever the mask."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from numpy.typing import NDArray

from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.errors import ElmExportError
from elmexport.mil.executor import MilModel
from elmexport.runtimes import open_artifact
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.coreml import open_runtime
from elmexport.runtimes.coreml_gpu import CHUNK
from elmexport.runtimes.generation import generate
from elmexport.runtimes.sampler import Sampling
from elmexport.runtimes.torch import TorchRuntime
from tests.conftest import ExportTo
from tests.fake_core_ml import FakeMLModel
from tests.memory_checkpoint import MemoryCheckpoint
from tests.mil.packages import function, write_package
from tests.reference import kl, reference_logits

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="on macOS Core ML itself runs the package, not the executor tested here")

GPU = {"device": "gpu"}


@pytest.fixture(scope="module")
def artifact(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> Path:
    return export_to(small_checkpoint, "coreml", "fp16", settings=GPU)


@pytest.fixture(scope="module")
def model(artifact: Path) -> MilModel:
    (package,) = artifact.glob("*.mlpackage")
    return MilModel(package)


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


@pytest.mark.slow
def test_what_core_ml_is_given(
    artifact: Path, ids: NDArray[np.int64], expected: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake, which checks the inputs: a prompt, then a token behind it."""
    monkeypatch.setattr("elmexport.runtimes.coreml_gpu.sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr("coremltools.models.MLModel", FakeMLModel)
    runtime = open_artifact(artifact)
    assert runtime.name == "core ml"
    assert kl(expected[:10], runtime.logits(ids[:10])).max() < 1e-3
    assert kl(expected[10:11], runtime.logits(ids[10:11], 10)).max() < 1e-3


def call(model: MilModel, states: dict[str, torch.Tensor], ids: NDArray[np.int64], mask: torch.Tensor) -> NDArray[np.float32]:
    inputs = {"inputIds": torch.from_numpy(ids[None]), "causalMask": mask}
    return model.run(inputs, states)["logits"][0].numpy()


@pytest.mark.slow
def test_sizes_come_from_the_package(runtime: Runtime, small_checkpoint: MemoryCheckpoint) -> None:
    config = small_checkpoint.config
    assert (runtime.name, runtime.vocab_size, runtime.context) == ("mil executor", config.vocab_size, config.max_context_length)


@pytest.mark.parametrize("length", [1, 5, 64, 128])
def test_prefill_and_decode_equal_the_full_forward(
    length: int, runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64]
) -> None:
    logits = runtime.logits(ids[:length])
    assert logits.dtype == np.float32
    assert kl(expected[:length], logits).max() < 1e-3
    for position in range(length, min(length + 3, len(ids))):
        assert kl(expected[position : position + 1], runtime.logits(ids[position : position + 1], position)).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5, 64])
@pytest.mark.parametrize("start", [1, 40, 63, 64])
def test_a_second_prefill_continues_the_first(
    start: int, length: int, runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64]
) -> None:
    runtime.logits(ids[:start])
    assert kl(expected[start : start + length], runtime.logits(ids[start : start + length], start)).max() < 1e-3


def test_without_rounding_only_the_weights_are_fp16(artifact: Path, small_checkpoint: MemoryCheckpoint, ids: NDArray[np.int64]) -> None:
    halves = {name: array.astype(np.float16).astype(np.float32) for name, array in small_checkpoint.arrays.items()}
    logits = open_runtime(artifact, precision="fp32").logits(ids[:70])
    assert kl(reference_logits(small_checkpoint.config, halves, ids[:70]), logits).max() < 2e-6  # what is left: RoPE tables in fp16


@pytest.mark.parametrize("rows", ["one row", "a row for each token"])
def test_a_mask_of_zeros_gives_what_the_causal_mask_gives(rows: str, model: MilModel, ids: NDArray[np.int64]) -> None:
    first, second = 20, 30
    causal = torch.full((second, second), -torch.inf).triu(1)[None, None]
    states = model.make_states()
    expected = [
        call(model, states, ids[:first], causal[:, :, :first, :first]),
        call(model, states, ids[first:second], causal[:, :, first:]),
    ]
    states = model.make_states()
    for (start, stop), logits in zip([(0, first), (first, second)], expected, strict=True):
        zeros = torch.zeros(1, 1, 1 if rows == "one row" else stop - start, stop)
        np.testing.assert_array_equal(call(model, states, ids[start:stop], zeros), logits)


def test_the_mask_that_is_given_counts(model: MilModel, small_checkpoint: MemoryCheckpoint, ids: NDArray[np.int64]) -> None:
    """Left padding, hidden by the caller: what follows is as if it were not there, since rotary positions are relative."""
    text, padding = ids[:20], 7
    mask = torch.zeros(1, 1, 1, padding + len(text))
    mask[..., :padding] = -torch.inf
    logits = call(model, model.make_states(), np.concatenate([ids[100 : 100 + padding], text]), mask)[padding:]
    assert kl(reference_logits(small_checkpoint.config, small_checkpoint.arrays, text), logits).max() < 1e-3


def swift_transformers(model: MilModel, ids: NDArray[np.int64], prompt: int) -> Iterator[NDArray[np.float32]]:
    """As its LanguageModelWithStatefulKVCache calls a model: the prompt, then token by token; `[1, 1, 1, tokens + 1]` zeros for a mask."""
    states = model.make_states()
    for count in range(prompt, len(ids) + 1):
        fed = ids[:count] if count == prompt else ids[count - 1 : count]
        yield call(model, states, fed, torch.zeros(1, 1, 1, count + 1))


@pytest.mark.parametrize("prompt", [1, 2, 30])
def test_swift_transformers_masks_are_one_column_too_wide(
    prompt: int, model: MilModel, ids: NDArray[np.int64], expected: NDArray[np.float64]
) -> None:
    """So it begins at place 1 of the cache. The empty place 0 must not be attended to."""
    logits = np.concatenate(list(swift_transformers(model, ids[:40], prompt)))
    assert kl(expected[:40], logits).max() < 1e-3


def test_last(runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    for last in (1, 50, 100):
        logits = runtime.logits(ids[:100], last=last)
        assert logits.shape == (last, runtime.vocab_size)
        assert kl(expected[100 - last : 100], logits).max() < 1e-3


def test_long_texts_go_in_chunks(
    runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elmexport.runtimes.coreml_gpu.CHUNK", 48)
    assert len(ids) < CHUNK
    assert kl(expected, runtime.logits(ids)).max() < 1e-3
    assert kl(expected[60:], runtime.logits(ids, last=len(ids) - 60)).max() < 1e-3
    (logits,) = runtime.continuations([ids[10:]], 10)
    assert kl(expected[10:], logits).max() < 1e-3


def test_continuations_are_what_each_gives_alone(runtime: Runtime, ids: NDArray[np.int64]) -> None:
    prefix, others = ids[:12], [ids[12:20], ids[50:53], ids[12:13]]
    runtime.logits(prefix)
    found = runtime.continuations(others, len(prefix))
    for other, logits in zip(others, found, strict=True):
        np.testing.assert_allclose(logits, runtime.logits(other, len(prefix)), atol=2e-2)


def test_going_back_forgets(runtime: Runtime, ids: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    runtime.logits(np.concatenate([ids[:10], ids[60:90]]))
    assert kl(expected[10:20], runtime.logits(ids[10:20], 10)).max() < 1e-3
    assert kl(expected[:5], runtime.logits(ids[:5])).max() < 1e-3


def test_position_past_the_end(runtime: Runtime, ids: NDArray[np.int64]) -> None:
    runtime.logits(ids)
    with pytest.raises(ElmExportError, match=f"need a context of {len(ids) + 1}; this artifact holds {len(ids)}"):
        runtime.logits([1], len(ids))


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "limit"), [("fp16", 1e-3), ("int8", 0.01), ("int4", 0.2)])
def test_tiny_agrees_with_torch(tiny: Checkpoint, export_to: ExportTo, quant: str, limit: float) -> None:
    ids = np.random.default_rng(0).integers(0, tiny.config.vocab_size, 100)
    logits = open_artifact(export_to(tiny, "coreml", quant, settings=GPU)).logits(ids)
    assert kl(TorchRuntime(tiny).logits(ids), logits).mean() < limit


@pytest.mark.slow
def test_both_devices_say_the_same(tiny: Checkpoint, export_to: ExportTo) -> None:
    """Greedy tokens of the two forms; fp16, so that both have the same weights."""
    assert tiny.tokenizer_path is not None
    prompt = load_tokenizer(tiny.tokenizer_path).encode("Once upon a time there was a king, and")
    for_gpu, for_engine = (
        list(
            generate(
                open_artifact(export_to(tiny, "coreml", "fp16", settings=settings)), prompt, max_tokens=60, sampling=Sampling(), eos_ids=()
            )
        )
        for settings in (GPU, {})
    )
    assert len(for_gpu) == 60
    assert for_gpu == for_engine


def test_a_package_with_other_shapes(tmp_path: Path) -> None:
    specs = {
        "inputIds": mb.TensorSpec((1, 4), dtype=types.int32),
        "causalMask": mb.TensorSpec((1, 1, 4, 4), dtype=types.fp16),
        "keyCache": mb.StateTensorSpec((1, 2, 4, 8), dtype=types.fp16),
        "valueCache": mb.StateTensorSpec((1, 2, 4, 8), dtype=types.fp16),
    }

    def build(inputIds: object, causalMask: object, keyCache: object, valueCache: object) -> object:
        return mb.identity(x=causalMask, name="logits")

    package = write_package(tmp_path / "fixed.mlpackage", {"main": function(specs, build)})
    with pytest.raises(ElmExportError, match=r"inputs of a language model for GPUs, but other shapes.*inputIds \[1, 4\]"):
        open_runtime(package)
