"""Our Core ML packages through the MIL executor: the numbers of the reference, at every place of the cache, in every form, and its refusals.

Core ML itself is a fake (`tests.fake_core_ml`), so that what the runtime feeds it is tested too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from numpy.typing import NDArray

from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError, VerificationError
from elmexport.mil.executor import MilModel, Precision
from elmexport.mil.program import Program
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.runtimes import open_artifact
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.coreml import CoreMLRuntime, open_for_check, open_runtime
from elmexport.runtimes.coreml_contract import Contract
from elmexport.runtimes.coreml_engines import CoreMLEngine, NarrowedMilEngine, PaddedMilEngine
from elmexport.runtimes.generation import generate
from elmexport.runtimes.sampler import Sampling
from elmexport.runtimes.torch import TorchRuntime
from targets.coreml.neural_engine import head
from tests.conftest import ExportTo, MadeOnce
from tests.fake_core_ml import FakeMLModel
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.mil.packages import function, write_package
from tests.reference import kl, reference_logits

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="on macOS Core ML itself runs the package, not the executor tested here")

CHUNK = 64
FORMS: dict[str, dict[str, Any]] = {
    "state": {},
    "io": {"kv": "io"},
    "prefill 32": {"prefill": 32},
    "io, prefill 96": {"kv": "io", "prefill": 96},
    "in packages": {"max_package_mb": 1.4},
    "in packages, io": {"max_package_mb": 1.4, "kv": "io"},
}
ArtifactOf = Callable[..., Path]


@pytest.fixture(scope="module")
def artifact_of(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> ArtifactOf:
    """`artifact_of(**settings)`, each made once."""
    made: dict[str, Path] = {}

    def call(**settings: Any) -> Path:
        key = str(settings)
        if key not in made:
            made[key] = export_to(small_checkpoint, "coreml", "fp16", settings=settings)
        return made[key]

    return call


@pytest.fixture(scope="module")
def artifact(artifact_of: ArtifactOf) -> Path:
    return artifact_of()


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


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "limit"), [("fp16", 1e-3), ("int8", 0.01), ("lut8", 0.01), ("lut6", 0.02), ("lut4", 0.2)])
def test_tiny_agrees_with_torch(tiny: Checkpoint, tiny_artifact: MadeOnce, quant: str, limit: float) -> None:
    ids = np.random.default_rng(0).integers(0, tiny.config.vocab_size, 100)
    logits = open_artifact(tiny_artifact("coreml", quant)).logits(ids)
    assert kl(TorchRuntime(tiny).logits(ids), logits).mean() < limit


@pytest.mark.slow
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


@pytest.mark.slow
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


def padded_engine(program: Program, contract: Contract, precision: Precision) -> PaddedMilEngine:
    return PaddedMilEngine(MilModel(contract.with_scores(program), precision=precision), contract)


@pytest.fixture(params=["executor", "executor at full sizes", "core ml"])
def open_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Runtime]:
    """Opens an artifact in one of the ways in which packages are run."""
    engines = {"executor": NarrowedMilEngine, "executor at full sizes": PaddedMilEngine, "core ml": CoreMLEngine}

    def call(path: Path) -> Runtime:
        if request.param == "core ml":
            monkeypatch.setattr("elmexport.runtimes.coreml.sys", SimpleNamespace(platform="darwin"))
            monkeypatch.setattr("coremltools.models.MLModel", FakeMLModel)
        elif request.param == "executor at full sizes":
            monkeypatch.setattr("elmexport.runtimes.coreml.open_mil_engine", padded_engine)
        runtime = open_artifact(path)
        assert isinstance(runtime, CoreMLRuntime)
        assert isinstance(runtime.engine(), engines[request.param])
        assert runtime.name == ("core ml" if request.param == "core ml" else "mil executor")
        return runtime

    return call


@pytest.mark.slow
@pytest.mark.parametrize("form", [pytest.param(form, marks=[] if form in ("state", "io") else pytest.mark.slow) for form in FORMS])
def test_every_form_at_every_boundary(
    form: str, open_form: Callable[[Path], Runtime], artifact_of: ArtifactOf, ids: NDArray[np.int64], expected: NDArray[np.float64]
) -> None:
    """Prompts that end at, before and behind a chunk's end, each followed by a few tokens; the last rows of a longer one; the last place."""
    runtime = open_form(artifact_of(**FORMS[form]))
    assert isinstance(runtime, CoreMLRuntime)
    chunk = runtime.chunk
    for length in sorted({1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk, len(ids) - 1, len(ids)} & set(range(len(ids) + 1))):
        found = runtime.logits(ids[:length], last=1)
        assert kl(expected[length - 1 : length], found).max() < 1e-3, length
        for position in range(length, min(length + 2, len(ids))):
            assert kl(expected[position : position + 1], runtime.logits(ids[position : position + 1], position)).max() < 1e-3, position
    assert kl(expected[95:100], runtime.logits(ids[:100], last=5)).max() < 1e-3
    rows = runtime.continuations([ids[40:50], ids[40:41]], 40)
    assert kl(expected[40:50], rows[0]).max() < 1e-3 and kl(expected[40:41], rows[1]).max() < 1e-3
    assert kl(expected[40:43], runtime.logits(ids[40:43], 40)).max() < 1e-3  # they left no trace


@pytest.mark.slow
def test_every_form_gives_the_same_tokens(
    open_form: Callable[[Path], Runtime], artifact_of: ArtifactOf, ids: NDArray[np.int64], small_checkpoint: MemoryCheckpoint
) -> None:
    prompt = ids[:70].tolist()
    model = TorchRuntime(small_checkpoint)
    reference = list(generate(model, prompt, max_tokens=20, sampling=Sampling(), eos_ids=()))
    for settings in (*FORMS.values(), {"argmax": True}, {"argmax": True, "kv": "io"}):
        runtime = open_form(artifact_of(**settings))
        assert list(generate(runtime, prompt, max_tokens=20, sampling=Sampling(), eos_ids=())) == reference, settings
        assert runtime.greedy(prompt) == reference[0]


@pytest.mark.slow
def test_a_wide_vocabulary(small_config: OpenELMConfig, export_to: ExportTo, open_form: Callable[[Path], Runtime]) -> None:
    """Logits in parts, and the most likely token of all parts."""
    checkpoint = random_checkpoint(
        dataclasses.replace(small_config, vocab_size=40000, num_transformer_layers=1, qkv_multipliers=1.0, ffn_multipliers=1.0)
    )
    ids = np.array([0, 13333, 13334, 26667, 39999, 5])
    expected = reference_logits(checkpoint.config, checkpoint.arrays, ids)
    runtime = open_form(export_to(checkpoint, "coreml", "fp16"))
    assert runtime.vocab_size == 40000
    assert kl(expected, runtime.logits(ids)).max() < 1e-3
    greedy = open_form(export_to(checkpoint, "coreml", "fp16", settings={"argmax": True}))
    assert greedy.vocab_size == 40000
    for length in range(1, len(ids) + 1):
        assert greedy.greedy(ids[:length]) == expected[length - 1].argmax()


@pytest.mark.slow
def test_a_package_without_logits(artifact_of: ArtifactOf, ids: NDArray[np.int64]) -> None:
    runtime = open_artifact(artifact_of(argmax=True))
    for call in (lambda: runtime.logits(ids[:3]), lambda: runtime.continuations([ids[:3]], 0)):
        with pytest.raises(ElmExportError, match="gives the most likely token and no logits; export it without --argmax"):
            call()
    with pytest.raises(ElmExportError, match=r"temperature is 0\.5, but this package .*, or use --temperature 0"):
        generate(runtime, [1], max_tokens=1, sampling=Sampling(temperature=0.5), eos_ids=())


@pytest.mark.slow
def test_the_self_check_looks_behind_the_token(
    artifact_of: ArtifactOf, ids: NDArray[np.int64], expected: NDArray[np.float64], export_to: ExportTo, small_checkpoint: MemoryCheckpoint
) -> None:
    assert kl(expected[:70], open_for_check(artifact_of(argmax=True)).logits(ids[:70])).max() < 1e-3
    artifact = export_to(small_checkpoint, "coreml", "fp16", settings={"argmax": True}, verify=True)
    check = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["self_check"]
    assert check["done"] and check["tokens"] == 128 and 0 < check["kl_mean"] < 1e-3


@pytest.mark.slow
def test_a_wrong_token_is_found(
    export_to: ExportTo, small_checkpoint: MemoryCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mb.reduce_argmax
    monkeypatch.setattr(head.mb, "reduce_argmax", lambda name=None, **inputs: mb.add(x=real(**inputs), y=np.int32(1), name=name))
    with pytest.raises(VerificationError, match="the package's token is not the one with the largest logit"):
        export_to(small_checkpoint, "coreml", "fp16", settings={"argmax": True}, verify=True, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_package_of_another_kind(tmp_path: Path) -> None:
    made = function({"x": mb.TensorSpec((1, 4), dtype=types.fp16)}, lambda x: mb.relu(x=x))
    package = write_package(tmp_path / "other.mlpackage", {"main": made})
    with pytest.raises(ElmExportError, match=r"its functions are main, not prefill and decode\); run it with elmexport\.mil directly"):
        open_runtime(package)


def test_a_package_with_other_inputs(tmp_path: Path) -> None:
    made = {name: function({"x": mb.TensorSpec((1, 4), dtype=types.fp16)}, lambda x: mb.relu(x=x)) for name in ("prefill", "decode")}
    with pytest.raises(ElmExportError, match="inputs of decode are x, not input_ids, position"):
        open_runtime(write_package(tmp_path / "other.mlpackage", made))


def test_no_package(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"should hold one \.mlpackage, and holds none; give the package itself"):
        open_runtime(tmp_path)
