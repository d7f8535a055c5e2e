"""The MLX runtime: cache positions, what it widens, and folders that cannot be opened."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from elmexport.artifact import Artifact
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.runtimes import mlx as mlx_module
from elmexport.runtimes import open_artifact
from elmexport.runtimes.mlx import MlxRuntime, open_runtime
from tests.conftest import SmallArtifact
from tests.graph.test_forward import token_ids
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import kl, log_probs, reference_logits

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]' mlx-lm")
ON_CPU = not mx.metal.is_available()


@pytest.fixture
def runtime(small_artifact: SmallArtifact) -> MlxRuntime:
    found = open_artifact(small_artifact("mlx", "int8"))
    assert isinstance(found, MlxRuntime)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp16", "int8", "int4", "mxfp4"])
def test_prefill_and_decode_equal_the_full_forward(
    small_checkpoint: MemoryCheckpoint, small_artifact: SmallArtifact, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At positions 0, middle and last, in parts and one by one, to the end of the cache; in the runtime's own chunks, too."""
    runtime = open_artifact(small_artifact("mlx", quant))
    ids = token_ids(runtime.context, small_checkpoint.config)
    full = runtime.logits(ids)
    cuts = [0, 1, 2, 50, 51, 90, runtime.context - 1, runtime.context]
    parts = np.concatenate([runtime.logits(ids[start:end], start) for start, end in pairwise(cuts)])
    monkeypatch.setattr(mlx_module, "CHUNK", 7)
    for found in (parts, runtime.logits(ids)):
        assert np.abs(log_probs(found) - log_probs(full)).max() < (1e-4 if ON_CPU else 0.05)
    assert np.abs(log_probs(runtime.logits(ids, last=9)) - log_probs(full[-9:])).max() < (1e-4 if ON_CPU else 0.05)


def test_going_back_forgets_what_came_after(runtime: MlxRuntime, small_checkpoint: MemoryCheckpoint) -> None:
    ids = token_ids(60, small_checkpoint.config)
    other = ids[::-1]
    runtime.logits(ids)
    branched = np.concatenate((ids[:20], other[:10]))
    found = runtime.logits(other[:10], 20)
    assert kl(runtime.logits(branched)[20:], found).max() < (1e-9 if ON_CPU else 1e-3)


def test_matches_the_reference(small_checkpoint: MemoryCheckpoint, small_artifact: SmallArtifact) -> None:
    ids = token_ids(128, small_checkpoint.config)
    expected = reference_logits(small_checkpoint.config, small_checkpoint.arrays, ids)
    assert kl(expected, open_artifact(small_artifact("mlx", "fp16")).logits(ids)).max() < 1e-4
    assert kl(expected, open_artifact(small_artifact("mlx", "int8")).logits(ids)).mean() < 0.01


@pytest.mark.skipif(not ON_CPU, reason="on a GPU nothing is widened")
def test_codes_stay_as_they_are(small_artifact: SmallArtifact) -> None:
    runtime = open_artifact(small_artifact("mlx", "mxfp4"))
    assert isinstance(runtime, MlxRuntime)
    layer = runtime._model.layers[0]
    assert (layer.ffn.proj_1.weight.dtype, layer.ffn.proj_1.scales.dtype) == (mx.uint32, mx.uint8)
    table = runtime._model.transformer.token_embeddings
    assert (table.weight.dtype, table.scales.dtype, table.biases.dtype) == (mx.uint32, mx.float32, mx.float32)
    assert layer.attn_norm.weight.dtype == mx.float32


def test_a_folder_of_mlx_lms_own(small_artifact: SmallArtifact, tmp_path: Path) -> None:
    """No manifest: the context is the model's."""
    folder = Path(shutil.copytree(small_artifact("mlx", "int4"), tmp_path / "copy"))
    (folder / "manifest.json").unlink()
    runtime = open_runtime(folder)
    assert (runtime.context, runtime.vocab_size, runtime.name) == (128, 512, "mlx")
    assert Artifact.open(small_artifact("mlx", "int4")).manifest.context == 128


def test_damaged_folders(small_artifact: SmallArtifact, tmp_path: Path) -> None:
    source = small_artifact("mlx", "int4")
    for name, content in (("model.safetensors", b"not weights"), ("config.json", b"{}")):
        folder = Path(shutil.copytree(source, tmp_path / name))
        (folder / name).write_bytes(content)
        with pytest.raises(ElmExportError, match=r"mlx-lm cannot load .*The files are damaged or of another kind|is not a|config.json"):
            MlxRuntime(folder, 128)
        with pytest.raises(ElmExportError, match="is damaged"):
            open_artifact(folder)
    folder = Path(shutil.copytree(source, tmp_path / "gone"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ElmExportError, match="No safetensors found"):
        MlxRuntime(folder, 128)


def test_settings_that_mlx_looks_at_only_where_it_uses_them(small_artifact: SmallArtifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_artifact("mlx", "int4"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_freq_constant": "wide"}))
    with pytest.raises(ElmExportError, match=r"mlx-lm cannot run .*The files are damaged"):
        MlxRuntime(folder, 128).logits([1, 2])


@pytest.mark.parametrize("name", ["mlx_lm", "mlx"])
def test_without_mlx(small_artifact: SmallArtifact, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == "mlx_lm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    if name == "mlx":
        for module in [module for module in sys.modules if module.startswith("mlx.")]:
            monkeypatch.delitem(sys.modules, module)
    with pytest.raises(MissingDependencyError, match=r"running MLX models needs mlx-lm; install it with: pip install 'elmexport\[mlx\]'"):
        open_artifact(small_artifact("mlx", "int4"))


@pytest.mark.slow
def test_as_many_files_may_be_open_as_before() -> None:
    """mlx-lm sets a limit of its own when it is imported."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    code = "import resource; from elmexport.runtimes.mlx import _mlx_lm; _mlx_lm(); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == min(before, 4096) or int(done.stdout) == before
