"""Importance matrices that are fine, incomplete, of another model, or damaged."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from numpy.typing import NDArray

from calibration.options import WeightOptions
from elmexport.artifact import Artifact
from elmexport.contracts.gguf import is_legacy_imatrix
from elmexport.errors import ElmExportError
from elmexport.inspection import list_tensors
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.target import find_target
from targets.gguf.imatrix import read_imatrix
from targets.gguf.lowering import matrices
from tests.conftest import ExportTo, SmallArtifact
from tests.memory_checkpoint import MemoryCheckpoint

Tensors = dict[str, NDArray[np.float32]]


def tensors_for(config: OpenELMConfig) -> Tensors:
    """As llama-imatrix leaves them: sums of squares over 10 tokens, none for the embedding."""
    rng = np.random.default_rng(0)
    tensors = {}
    for entry in matrices(config):
        for name in entry.names:
            if name != "token_embd.weight":
                tensors[f"{name}.in_sum2"] = 10 * rng.random((1, entry.spec.shape[1]), dtype=np.float32)
                tensors[f"{name}.counts"] = np.array([[10]], dtype=np.float32)
    return tensors


def write(path: Path, tensors: Tensors, *, kind: str | None = "imatrix") -> Path:
    writer = GGUFWriter(path, "openelm")
    writer.kv_data[0].clear()
    if kind is not None:
        writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["prose.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 64)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_means_of_squares(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    tensors = tensors_for(deep_config)
    tensors["blk.0.attn_qkv.weight.counts"][:] = 0  # nothing went through: llama.cpp takes ones
    found = read_imatrix(write(tmp_path / "imatrix.gguf", tensors))
    assert (found.datasets, found.chunks) == (("prose.txt",), 4)
    assert found.entries.keys() == {name.removesuffix(".counts") for name in tensors if name.endswith(".counts")}
    assert np.array_equal(found.entries["blk.1.ffn_up.weight"], tensors["blk.1.ffn_up.weight.in_sum2"][0] / np.float32(10))
    assert np.array_equal(found.entries["blk.0.attn_qkv.weight"], np.ones(192, dtype=np.float32))


@pytest.mark.parametrize(
    ("sound", "spoilt"),
    [
        (b"prose.txt", b"pros\x80.txt"),  # no UTF-8
        # An array of 2^62 texts, then one whose type is a type of arrays for ever.
        (b"imatrix.datasets" + struct.pack("<IIQ", 9, 8, 1), b"imatrix.datasets" + struct.pack("<IIQ", 9, 0, 1 << 62)),
        (b"imatrix.datasets" + struct.pack("<IIQ", 9, 8, 1), b"imatrix.datasets" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000),
        (b"imatrix.chunk_count" + struct.pack("<I", 4), b"imatrix.chunk_count" + struct.pack("<I", 6)),  # a float
    ],
)
def test_metadata_of_another_kind(tmp_path: Path, deep_config: OpenELMConfig, sound: bytes, spoilt: bytes) -> None:
    path = write(tmp_path / "imatrix.gguf", tensors_for(deep_config))
    data = path.read_bytes()
    assert data.count(sound) == 1
    path.write_bytes(data.replace(sound, spoilt))
    with pytest.raises(ElmExportError, match="damaged"):
        read_imatrix(path)


def test_an_array_without_end_is_not_counted(small_artifact: SmallArtifact, tmp_path: Path) -> None:
    """`inspect` reads with the same reader."""
    folder = Path(shutil.copytree(small_artifact("gguf", "int4"), tmp_path / "copy"))
    (file,) = folder.glob("*.gguf")
    scores = b"tokenizer.ggml.scores" + struct.pack("<II", 9, 6)
    data = file.read_bytes()
    file.write_bytes(data.replace(scores + struct.pack("<Q", 512), scores + struct.pack("<Q", 1 << 62)))
    assert file.read_bytes() != data
    with pytest.raises(ElmExportError, match="is damaged"):
        list_tensors(Artifact.open(folder))


def drop(tensors: Tensors) -> None:
    del tensors["blk.3.ffn_down.weight.in_sum2"], tensors["blk.3.ffn_down.weight.counts"]


def resize(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{name}.in_sum2"] = np.ones((1, 7), dtype=np.float32)
        tensors[f"{name}.counts"] = np.ones((1, 1), dtype=np.float32)

    return change


def spoil(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors["blk.2.ffn_up.weight.in_sum2"][0, 3] = value

    return change


def uncount(tensors: Tensors) -> None:
    del tensors["blk.2.ffn_up.weight.counts"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"has no entry for blk\.3\.ffn_down\.weight; use one that was made for this model"),
        (resize("blk.0.attn_qkv.weight"), r"has 7 values for blk\.0\.attn_qkv\.weight, whose rows have 192"),
        (resize("token_embd.weight"), r"has 7 values for token_embd\.weight, whose rows have 192"),
        (spoil(np.nan), r"has values for blk\.2\.ffn_up\.weight that are not finite or negative; the file is damaged"),
        (spoil(-1.0), r"has values for blk\.2\.ffn_up\.weight that are not finite or negative"),
        (uncount, r"has no usable count for blk\.2\.ffn_up\.weight"),
        (dict.clear, "holds no importance values"),
    ],
    ids=["missing", "other-size", "embedding-of-other-size", "nan", "negative", "no-count", "empty"],
)
def test_unusable(
    deep_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    tensors = tensors_for(deep_checkpoint.config)
    change(tensors)
    path = write(tmp_path / "imatrix.gguf", tensors)
    with pytest.raises(ElmExportError, match=message):
        export_to(deep_checkpoint, "gguf", "q4_k_m", out=tmp_path / "out", settings={"imatrix": path})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["imatrix.gguf"]


def uncount_all(tensors: Tensors) -> None:
    tensors["blk.2.ffn_up.weight.counts"][:] = 0


def drop_many(tensors: Tensors) -> None:
    for name in [name for name in tensors if "ffn_down" in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop_many,
            r"has no entry for blk\.0\.ffn_down\.weight, blk\.1\.ffn_down\.weight, blk\.2\.ffn_down\.weight and 2 more; use one that was made",
        ),
        (uncount_all, r"counted no token for blk\.2\.ffn_up\.weight; use one that was made for this model"),
    ],
)
def test_the_command_that_mends_it(
    deep_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    tensors = tensors_for(deep_checkpoint.config)
    change(tensors)
    path = write(tmp_path / "imatrix.gguf", tensors)
    for options in ({"settings": {"imatrix": path}}, {"weights": WeightOptions(calibrate=path)}):
        quant = "q4_k_m" if "settings" in options else "int4"
        with pytest.raises(ElmExportError, match=message) as caught:
            export_to(deep_checkpoint, "gguf", quant, out=tmp_path / "out", **options)
        assert "elmexport calibrate --model MODEL --imatrix FILE.gguf" in str(caught.value) and len(str(caught.value)) < 600


def legacy(path: Path, config: OpenELMConfig) -> Path:
    """As llama-imatrix wrote it before GGUF: entries of name, calls and values, then chunks and data set."""
    entries = [(name, entry.spec.shape[1]) for entry in matrices(config) for name in entry.names]
    content = struct.pack("<i", len(entries))
    for name, size in entries:
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 4, size) + np.ones(size, np.float32).tobytes()
    path.write_bytes(content + struct.pack("<ii", 4, 5) + b"a.txt")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imatrix.dat", "imatrix.gguf", "imatrix"])
def test_the_former_binary_form(deep_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, name: str) -> None:
    path = legacy(tmp_path / name, deep_checkpoint.config)
    words = rf"{name} is an importance matrix in llama.cpp's former binary form; convert it: llama-imatrix --in-file {path} -o imatrix(-1)?\.gguf"
    for quant, options in (("q4_k_m", {"settings": {"imatrix": path}}), ("int4", {"weights": WeightOptions(calibrate=path)})):
        with pytest.raises(ElmExportError, match=words):
            export_to(deep_checkpoint, "gguf", quant, **options)


def test_a_text_is_no_importance_matrix(tmp_path: Path) -> None:
    for content in (b"", b"abc", b"Once upon a time there was a king.weight", bytes(range(256))):
        (tmp_path / "text.txt").write_bytes(content)
        assert not is_legacy_imatrix(tmp_path / "text.txt")
    assert not is_legacy_imatrix(tmp_path) and not is_legacy_imatrix(tmp_path / "none")


def test_files_of_other_kinds(tmp_path: Path, deep_config: OpenELMConfig) -> None:
    whole = write(tmp_path / "imatrix.gguf", tensors_for(deep_config)).read_bytes()
    for cut in (0, 3, 40, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(ElmExportError, match=r"cut\.gguf is not a GGUF file, or is damaged"):
            read_imatrix(tmp_path / "cut.gguf")
    with pytest.raises(ElmExportError, match=r"cannot read .*none\.gguf: No such file"):
        read_imatrix(tmp_path / "none.gguf")
    model = write(tmp_path / "model.gguf", tensors_for(deep_config), kind="model")
    with pytest.raises(ElmExportError, match=r"is a GGUF file of type 'model', not 'imatrix'"):
        read_imatrix(model)


@pytest.mark.parametrize("quant", ["int4", "int8", "fp16"])
def test_no_use_for_other_quantizations(quant: str, tmp_path: Path) -> None:
    target = find_target("gguf", {"imatrix": tmp_path / "imatrix.gguf"})
    with pytest.raises(ElmExportError, match=rf"--imatrix has no use with --quant {quant}; choose one of ggml's .*q4_k_m"):
        target.recipe(quant)


@pytest.mark.slow
def test_the_embedding_may_have_an_entry(deep_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path) -> None:
    tensors = tensors_for(deep_checkpoint.config)
    without = export_to(deep_checkpoint, "gguf", "q4_0", settings={"imatrix": write(tmp_path / "without.gguf", tensors)})
    tensors["token_embd.weight.in_sum2"] = np.linspace(1, 100, 192, dtype=np.float32)[None]
    tensors["token_embd.weight.counts"] = np.ones((1, 1), dtype=np.float32)
    with_it = export_to(deep_checkpoint, "gguf", "q4_0", settings={"imatrix": write(tmp_path / "with.gguf", tensors)})
    assert next(with_it.glob("*.gguf")).read_bytes() != next(without.glob("*.gguf")).read_bytes()
