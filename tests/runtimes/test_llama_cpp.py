"""GGUF artifacts in llama.cpp, against the float64 forward pass."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.runtimes import llama_cpp as module
from elmexport.runtimes import open_artifact
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.llama_cpp import LlamaCppRuntime, open_runtime
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.reference import Array, kl, log_probs, reference_logits
from tests.targets.gguf.test_gguf_target import gguf_path

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")

CONTEXT = 128
Opened = Callable[[str], Runtime]


@pytest.fixture(scope="module")
def ids(small_config: OpenELMConfig) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, small_config.vocab_size, CONTEXT)


@pytest.fixture(scope="module")
def reference(small_checkpoint: MemoryCheckpoint, ids: NDArray[np.int64]) -> Array:
    return reference_logits(small_checkpoint.config, small_checkpoint.arrays, ids)


@pytest.fixture(scope="module")
def opened(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> Iterator[Opened]:
    done: dict[str, Runtime] = {}

    def call(quant: str) -> Runtime:
        if quant not in done:
            done[quant] = open_artifact(export_to(small_checkpoint, "gguf", quant))
        return done[quant]

    yield call
    for runtime in done.values():
        runtime.close()


@pytest.fixture(scope="module")
def folder(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> Path:
    """An artifact for tests that do not mind which."""
    return export_to(small_checkpoint, "gguf", "int8")


def largest_difference(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    return float(np.abs(log_probs(found) - log_probs(expected)).max())


def test_f32_is_the_float64_forward_pass(opened: Opened, reference: Array, ids: NDArray[np.int64]) -> None:
    runtime = opened("fp32")
    assert (runtime.name, runtime.vocab_size, runtime.context) == ("llama.cpp", 512, CONTEXT)
    logits = runtime.logits(ids)
    assert logits.shape == (CONTEXT, 512) and logits.dtype == np.float32
    assert largest_difference(logits, reference) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "limit"), [("fp16", 1e-4), ("bf16", 2e-3), ("int8", 0.01), ("int4", 0.5)])
def test_other_types_are_near(opened: Opened, reference: Array, ids: NDArray[np.int64], quant: str, limit: float) -> None:
    assert kl(reference, opened(quant).logits(ids)).mean() < limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_freq_constant": 500.0},
        {"num_gqa_groups": 1},
        {"qkv_multipliers": 1.0, "ffn_multipliers": 2.0},
        {"num_transformer_layers": 1, "qkv_multipliers": 1.0, "ffn_multipliers": 1.5},
    ],
    ids=str,
)
def test_other_configurations(small_config: OpenELMConfig, export_to: ExportTo, ids: NDArray[np.int64], changes: dict[str, Any]) -> None:
    """Without a vocabulary, as random weights come."""
    checkpoint = random_checkpoint(replace(small_config, **changes))
    expected = reference_logits(checkpoint.config, checkpoint.arrays, ids[:40])
    assert largest_difference(open_artifact(export_to(checkpoint, "gguf", "fp32")).logits(ids[:40]), expected) < 1e-4


# Before it multiplies with int4, llama.cpp rounds activations to 8 bits: a last bit of difference between its kernels for one token and for
# many may round to another code, and stays in the cache.
@pytest.mark.parametrize(("quant", "limit"), [("fp32", 1e-3), ("int4", 0.3)])
@pytest.mark.parametrize("prefill", [1, CONTEXT // 2, CONTEXT - 1])
def test_prefill_and_decode_equal_the_full_pass(opened: Opened, ids: NDArray[np.int64], quant: str, limit: float, prefill: int) -> None:
    runtime = opened(quant)
    full = runtime.logits(ids)
    parts = [runtime.logits(ids[:prefill])]
    parts += [runtime.logits(ids[i : i + 1], i) for i in range(prefill, CONTEXT)]
    assert largest_difference(np.concatenate(parts), full) < limit


def test_going_back_forgets_what_came_after(opened: Opened, ids: NDArray[np.int64]) -> None:
    runtime = opened("fp32")
    full = runtime.logits(ids)
    runtime.logits(ids[::-1][:64], 64)
    assert largest_difference(runtime.logits(ids[64:], 64), full[64:]) < 1e-3
    assert largest_difference(runtime.logits(ids[:1]), full[:1]) < 1e-3


def test_last(opened: Opened, ids: NDArray[np.int64]) -> None:
    runtime = opened("fp32")
    full = runtime.logits(ids)
    for last in (1, 5):
        logits = runtime.logits(ids, last=last)
        assert logits.shape == (last, 512)
        assert largest_difference(logits, full[-last:]) < 1e-3


def test_prompts_longer_than_a_batch(opened: Opened, ids: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = opened("fp32")
    full, last = runtime.logits(ids), runtime.logits(ids, last=90)
    monkeypatch.setattr(module, "BATCH", 48)
    assert largest_difference(runtime.logits(ids), full) < 1e-3
    assert largest_difference(runtime.logits(ids, last=90), last) < 1e-3


def test_past_the_end_is_an_error(opened: Opened, ids: NDArray[np.int64]) -> None:
    runtime = opened("fp32")
    runtime.logits(ids)
    with pytest.raises(ElmExportError, match=r"1 tokens at position 128 need a context of 129; this artifact holds 128"):
        runtime.logits([1], CONTEXT)


def test_engine_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime = open_artifact(folder)
    runtime.logits([1, 2, 3])
    runtime.close()
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_closed_runtime_says_so(folder: Path) -> None:
    runtime = open_artifact(folder)
    runtime.close()
    runtime.close()
    with pytest.raises(ElmExportError, match="closed"):
        runtime.logits([1])


def test_a_bare_file(folder: Path, ids: NDArray[np.int64]) -> None:
    bare = open_artifact(gguf_path(folder))
    assert isinstance(bare, LlamaCppRuntime)
    assert np.array_equal(bare.logits(ids[:9]), open_artifact(folder).logits(ids[:9]))


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 0.1, 0.5, 0.999, -1])
def test_truncated_files(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], keep: float) -> None:
    data = gguf_path(folder).read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ElmExportError, match=r"cut\.gguf(:| is not a GGUF file).*(export it again|give the \.gguf)"):
        open_runtime(path)
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_error_gives_llama_cpps_reason(folder: Path, tmp_path: Path) -> None:
    data = gguf_path(folder).read_bytes()
    path = tmp_path / "other.gguf"
    path.write_bytes(data.replace(b"openelm", b"openelf"))
    with pytest.raises(ElmExportError, match=r"cannot load .*other\.gguf: .*unknown model architecture: 'openelf'"):
        open_runtime(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ElmExportError, match=r"cannot load .*other\.gguf: tensor '.*' data is not within the file bounds"):
        open_runtime(path)


def test_folders_without_one_model(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"holds 0 \.gguf files"):
        open_runtime(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(ElmExportError, match=r"holds 2 \.gguf files; give the path of one"):
        open_runtime(tmp_path)
    with pytest.raises(ElmExportError, match=r"cannot read .*nothing\.gguf: No such file"):
        open_runtime(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (ModuleNotFoundError("No module named 'llama_cpp'", name="llama_cpp"), r"pip install 'elmexport\[llama\]'"),
        (RuntimeError("Failed to load: libgomp.so.1: cannot open shared object file"), r"does not load \(.*libgomp\.so\.1.*\); install"),
    ],
)
def test_an_engine_that_is_missing_or_broken_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problem: Exception, words: str
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "llama_cpp":
            raise problem
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    module.engine.cache_clear()
    with pytest.raises(MissingDependencyError, match=words):
        open_runtime(tmp_path / "x.gguf")


def test_importing_the_runtime_loads_no_engine() -> None:
    code = "import sys, elmexport.runtimes.llama_cpp; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
