"""The onnxruntime runtime: cache positions, and files that cannot be opened."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.runtimes import onnxruntime, open_artifact
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.onnxruntime import open_runtime
from tests.conftest import ExportTo
from tests.graph.test_forward import token_ids
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import kl, log_probs, reference_logits


@pytest.fixture(scope="module")
def folder(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> Path:
    return export_to(small_checkpoint, "onnx", "fp32")


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Runtime:
    return open_artifact(folder)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp32", "fp16", "int8", "int4"])
def test_prefill_and_decode_equal_the_full_forward(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, quant: str) -> None:
    """At positions 0, middle and last, in chunks and one by one, to the end of the cache."""
    runtime = open_artifact(export_to(small_checkpoint, "onnx", quant))
    ids = token_ids(runtime.context, small_checkpoint.config)
    full = runtime.logits(ids)
    cuts = [0, 1, 2, 50, 51, 90, runtime.context - 1, runtime.context]
    parts = [runtime.logits(ids[start:end], start) for start, end in pairwise(cuts)]
    found = np.concatenate(parts)
    if quant in ("fp32", "fp16"):
        assert np.abs(log_probs(found) - log_probs(full)).max() < {"fp32": 1e-4, "fp16": 0.05}[quant]
    # With 8-bit products a difference in the last bit of an activation can round to another code.
    assert kl(full, found).mean() < 1e-3


def test_matches_the_reference_at_every_position(runtime: Runtime, small_checkpoint: MemoryCheckpoint) -> None:
    ids = token_ids(runtime.context, small_checkpoint.config)
    expected = reference_logits(small_checkpoint.config, small_checkpoint.arrays, ids)
    assert np.abs(log_probs(runtime.logits(ids)) - log_probs(expected)).max() < 2e-3


def test_going_back_forgets_what_came_after(runtime: Runtime, small_checkpoint: MemoryCheckpoint) -> None:
    ids = token_ids(60, small_checkpoint.config)
    other = ids[::-1]
    runtime.logits(ids)
    branched = np.concatenate((ids[:20], other[:10]))
    found = runtime.logits(other[:10], 20)
    assert runtime.length == 30
    assert np.abs(found - reference_logits(small_checkpoint.config, small_checkpoint.arrays, branched)[20:]).max() < 1e-3


def test_last(runtime: Runtime, small_checkpoint: MemoryCheckpoint) -> None:
    ids = token_ids(9, small_checkpoint.config)
    full = runtime.logits(ids)
    assert full.shape == (9, small_checkpoint.config.vocab_size)
    for last in (1, 4):
        logits = runtime.logits(ids, last=last)
        assert logits.dtype == np.float32
        assert np.array_equal(logits, full[-last:])


@pytest.mark.parametrize("last", [1, 3, 8, 20, 29])
def test_long_prompts_are_read_in_parts(
    runtime: Runtime, small_checkpoint: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """Behind a prefix, whichever part the wanted logits begin in; the cache then continues."""
    monkeypatch.setattr(onnxruntime, "CHUNK", 8)
    ids = token_ids(40, small_checkpoint.config)
    expected = log_probs(reference_logits(small_checkpoint.config, small_checkpoint.arrays, ids))
    runtime.logits(ids[:10])
    calls: list[int] = []
    run = onnxruntime._Sequences.run

    def counted(self: onnxruntime._Sequences, part: np.ndarray, *args: object, **options: object) -> np.ndarray:
        calls.append(part.shape[1])
        return run(self, part, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(onnxruntime._Sequences, "run", counted)
    found = runtime.logits(ids[10:39], 10, last=last)
    assert sum(calls) == 29 and calls[-1] >= last and max(calls) == max(8, last)
    assert np.abs(log_probs(found) - expected[39 - last : 39]).max() < 2e-3
    assert np.abs(log_probs(runtime.logits(ids[39:], 39)) - expected[39:]).max() < 2e-3


def test_logits_stay_after_the_next_call(runtime: Runtime, small_checkpoint: MemoryCheckpoint) -> None:
    ids = token_ids(9, small_checkpoint.config)
    first = runtime.logits(ids)
    kept = first.copy()
    runtime.logits(ids[::-1])
    assert np.array_equal(first, kept)


def test_past_the_end(runtime: Runtime, small_checkpoint: MemoryCheckpoint) -> None:
    ids = token_ids(runtime.context, small_checkpoint.config)
    runtime.logits(ids)
    with pytest.raises(ElmExportError, match=f"1 tokens at position {runtime.context} need a context of {runtime.context + 1}"):
        runtime.logits([1], runtime.context)
    with pytest.raises(ElmExportError, match="need a context of 129; this artifact holds 128"):
        runtime.logits(np.append(ids, 1))


def test_bare_file(folder: Path, tmp_path: Path, small_checkpoint: MemoryCheckpoint) -> None:
    shutil.copytree(folder / "onnx", tmp_path / "bare")
    ids = token_ids(5, small_checkpoint.config)
    assert np.array_equal(open_artifact(tmp_path / "bare" / "model.onnx").logits(ids), open_artifact(folder).logits(ids))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("length", [0, 1000])
def test_truncated_model(copy: Path, length: int) -> None:
    with (copy / "onnx" / "model.onnx").open("r+b") as file:
        file.truncate(length)
    with pytest.raises(ElmExportError, match=r"model\.onnx"):  # by the manifest
        open_artifact(copy)
    with pytest.raises(ElmExportError, match=r"cannot be opened .*; copy it again or export it again"):  # by the engine
        open_runtime(copy)


def test_garbage(copy: Path) -> None:
    (copy / "onnx" / "model.onnx").write_bytes(b"\xff" * 5000)
    with pytest.raises(ElmExportError, match="cannot be opened"):
        open_runtime(copy)


def test_truncated_external_data(copy: Path) -> None:
    with (copy / "onnx" / "model.onnx_data").open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(ElmExportError, match=r"model\.onnx or its external data cannot be opened"):
        open_runtime(copy)


def test_missing_external_data(copy: Path) -> None:
    (copy / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(ElmExportError, match=r"model\.onnx or its external data cannot be opened"):
        open_runtime(copy)


def test_a_closed_runtime_says_so(folder: Path) -> None:
    runtime = open_artifact(folder)
    runtime.close()
    runtime.close()
    with pytest.raises(ElmExportError, match="closed"):
        runtime.logits([1])


def test_no_model_or_several(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match="holds 0 files of the form"):
        open_runtime(tmp_path)
    shutil.copy(copy / "onnx" / "model.onnx", copy / "onnx" / "model_fp16.onnx")
    with pytest.raises(ElmExportError, match="holds 2 files of the form"):
        open_runtime(copy)


def test_someone_elses_model(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "other", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "other.onnx")
    with pytest.raises(ElmExportError, match="none that elmexport wrote"):
        open_artifact(tmp_path / "other.onnx")


def test_without_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime"):
        open_artifact(folder)


OPENED = """
import os, sys
from pathlib import Path
from elmexport.runtimes.onnxruntime import open_runtime
open_runtime(Path(sys.argv[1]))
print(os.environ["ORT_DISABLE_TELEMETRY"], len(os.listdir("/proc/self/task")))
"""


def test_telemetry_is_switched_off(folder: Path, tmp_path: Path) -> None:
    """The thread that would send it is not even started, and no database is written for it. Who sets the variable decides."""

    def opened(home: str, **more: str) -> tuple[list[int], list[str]]:
        """What the process says and the files below its home. The environment is bare: onnxruntime sends nothing where CI is set, whatever we do."""
        (tmp_path / home).mkdir()
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / home), "ELMEXPORT_THREADS": "1", **more}
        command = [sys.executable, "-c", OPENED, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return [int(word) for word in done.stdout.split()], [file.name for file in (tmp_path / home).rglob("*") if file.is_file()]

    (off, threads), files = opened("off")
    (on, more), database = opened("on", ORT_DISABLE_TELEMETRY="0")
    assert (off, on) == (1, 0)
    assert threads < more
    assert not files and "onnxruntime.db" in database


def test_a_name_that_is_no_utf_8(folder: Path, tmp_path: Path) -> None:
    """onnxruntime loads it, and cannot give the name to Python."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (path,) = (copy / "onnx").glob("*.onnx")
    path.write_bytes(path.read_bytes().replace(b"attention_mask", b"\xffttention_mask"))
    with pytest.raises(ElmExportError, match="has inputs or outputs that are not those of an export"):
        open_runtime(path)
