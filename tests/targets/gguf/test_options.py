"""Split files, chat templates, and what is said where ggml is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from elmexport.artifact import Artifact
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.runtimes import open_artifact
from elmexport.target import find_target
from targets.gguf import LLAMA_CPPS, OURS, ggml
from targets.gguf.inspect import list_tensors
from tests.clients.llama_cpp_tools import LlamaCppTools
from tests.conftest import ExportTo, MadeOnce
from tests.memory_checkpoint import MemoryCheckpoint
from tests.targets.gguf.test_gguf_target import gguf_path, metadata

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.slow
def test_split_files_are_llama_cpps_own(
    tiny: Checkpoint, export_to: ExportTo, tiny_artifact: MadeOnce, llama_cpp_tools: LlamaCppTools, tmp_path: Path
) -> None:
    whole = gguf_path(tiny_artifact("gguf", "q4_k_m"))
    llama_cpp_tools.run("llama-gguf-split", "--split", "--split-max-size", "1M", whole, tmp_path / whole.stem)
    expected = sorted(tmp_path.iterdir())
    found = sorted(export_to(tiny, "gguf", "q4_k_m", settings={"split_max_size": "1M"}).glob("*.gguf"))
    assert len(found) > 2
    assert [path.name for path in found] == [path.name for path in expected]
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1", "100K", "600k", "700000"])
def test_split_artifacts_run(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, size: str) -> None:
    """A limit smaller than a tensor gives that tensor a file of its own."""
    whole, parts = (export_to(small_checkpoint, "gguf", "int8", settings=settings) for settings in ({}, {"split_max_size": size}))
    files = sorted(parts.glob("*.gguf"))
    assert len(files) > 1 and not (parts / "Modelfile").exists()
    assert files[0].name == f"Small-782K-Q8_0-00001-of-{len(files):05d}.gguf"
    sizes = [[tensor.n_bytes for tensor in GGUFReader(file).tensors] for file in files]
    limit = int(size.upper().replace("K", "000"))
    assert all(len(one) == 1 or sum(one) <= limit for one in sizes) and all(sizes)
    assert Artifact.open(parts).verify() == []
    assert [(t.name, t.shape) for t in list_tensors(parts, small_checkpoint.config)] == [
        (t.name, t.shape) for t in list_tensors(whole, small_checkpoint.config)
    ]
    ids = np.arange(3, 40)
    assert np.array_equal(open_artifact(whole).logits(ids), open_artifact(parts).logits(ids))


@pytest.mark.parametrize("size", ["", "0", "2T", "-1G", "1.5G", "all"])
def test_sizes_that_are_none(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, size: str) -> None:
    with pytest.raises(ElmExportError, match=r'--split-max-size is .*; give bytes, or thousands of them, like "500M" or "2G"'):
        export_to(small_checkpoint, "gguf", "int8", out=tmp_path / "out", settings={"split_max_size": size})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]}),
        ),
    ],
)
def test_chat_template(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    folder = export_to(small_checkpoint, "gguf", "int8", settings={"chat_template": tmp_path / name})
    assert metadata(folder)["tokenizer.chat_template"] == TEMPLATE
    assert "TEMPLATE" not in (folder / "Modelfile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.jinja", None, r"cannot read .*none\.jinja: No such file"),
        ("bytes.jinja", b"\xff\xfe\x00", r"bytes\.jinja is not text; give a Jinja chat template or a tokenizer_config\.json"),
        ("broken.json", b"{", r"broken\.json is not JSON"),
        ("without.json", b"{}", r"without\.json holds no chat template"),
        ("list.json", b"[1]", r"list\.json holds no chat template"),
        ("empty.jinja", b" \n", r"empty\.jinja holds no chat template"),
    ],
)
def test_unusable_chat_templates(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ElmExportError, match=message):
        export_to(small_checkpoint, "gguf", "int8", out=tmp_path / "out", settings={"chat_template": tmp_path / name})
    assert not (tmp_path / "out").exists()


def test_without_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in ("llama_cpp", "xllamacpp") else real(name, package)

    monkeypatch.setattr(ggml, "find_spec", find_spec)
    monkeypatch.setattr(ggml, "_library", ggml._library.__wrapped__)
    target = find_target("gguf")
    for quant in LLAMA_CPPS:
        with pytest.raises(
            MissingDependencyError, match=r"pip install 'elmexport\[ggml\]'.*Without it, --quant takes int4, int8, fp16, bf16 and fp32"
        ):
            target.recipe(quant)
    for quant in OURS:
        target.recipe(quant)


def test_the_prebuilt_wheel_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two packages that bring ggml compile it differently."""
    import torch

    from elmexport.quantization.schemes import find_scheme

    pytest.importorskip("xllamacpp", reason="the prebuilt wheel is not installed: pip install xllamacpp")
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((96, 512), dtype=np.float32))
    importance = rng.random(512, dtype=np.float32)

    def results() -> list[Any]:
        types = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
        kinds = [find_scheme(f"ggml-{name}") for name in types]
        assert len(kinds) == len(types)
        return [ggml.quantize(weight, kind, weights).tobytes() for kind in kinds for weights in (None, importance)]

    found = []
    for package in ("llama_cpp", "xllamacpp"):
        monkeypatch.setattr(ggml, "_LIBRARIES", {package: ggml._LIBRARIES[package]})
        monkeypatch.setattr(ggml, "_library", ggml._library.__wrapped__)
        found.append(results())
        monkeypatch.undo()
    assert found[0] == found[1]


def test_weights_beyond_the_types_range(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path) -> None:
    arrays = {name: array.copy() for name, array in small_checkpoint.arrays.items()}
    arrays["transformer.layers.2.ffn.proj_2.weight"][3, 5] = 1e9
    checkpoint = MemoryCheckpoint(small_checkpoint.config, arrays)
    with pytest.raises(ElmExportError, match=r"proj_2.*1e\+09 are too large for the fp16 scales of Q4_0; export in a float format"):
        export_to(checkpoint, "gguf", "q4_0", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
