"""Statistics as an importance matrix: the file's form, llama.cpp's programs reading it, and their own measurement beside ours."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from calibration.collect import collect
from calibration.statistics import Statistics
from calibration.text import Sample, bundled_text
from elmexport.checkpoint import open_checkpoint, open_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.errors import ElmExportError
from elmexport.importance import read_importance, write_importance
from targets.gguf.imatrix import read_imatrix
from tests.calibration.test_collect import sample_of
from tests.clients.llama_cpp_tools import LlamaCppTools
from tests.conftest import ExportTo, MadeOnce
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint

CHUNK = 256  # tokens


@pytest.fixture(scope="module")
def small_statistics(small_checkpoint: MemoryCheckpoint) -> Statistics:
    return collect(small_checkpoint, sample_of(small_checkpoint.config))


def test_the_file(small_checkpoint: MemoryCheckpoint, small_statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_importance(small_statistics, small_checkpoint.config, path)
    reader = GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert facts == {
        "general.type": "imatrix",
        "imatrix.datasets": ["random ids"],
        "imatrix.chunk_count": 5,
        "imatrix.chunk_size": 24,
    }
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    names = [f"blk.{i}.{part}" for i in range(3) for part in ("attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]
    assert set(tensors) == {f"{name}.weight.{kind}" for name in [*names, "token_embd"] for kind in ("in_sum2", "counts")}
    assert [tensor.name for tensor in reader.tensors][::2] == sorted(name for name in tensors if name.endswith("in_sum2"))
    for name, weight in (
        ("blk.2.ffn_up", "transformer.layers.2.ffn.proj_1.weight"),
        ("blk.2.ffn_gate", "transformer.layers.2.ffn.proj_1.weight"),
        ("blk.2.attn_output", "transformer.layers.2.attn.out_proj.weight"),
        ("token_embd", "transformer.token_embeddings.weight"),
    ):
        moments = small_statistics.moments(small_checkpoint.specs[weight])
        assert moments is not None
        assert tensors[f"{name}.weight.counts"] == [120.0]
        np.testing.assert_allclose(tensors[f"{name}.weight.in_sum2"], moments.mean_square.numpy() * 120.0, rtol=1e-6)


def test_round_trip(small_checkpoint: MemoryCheckpoint, small_statistics: Statistics, tmp_path: Path) -> None:
    write_importance(small_statistics, small_checkpoint.config, tmp_path / "a.gguf", datasets=["one.txt", "two.txt"])
    found = read_importance(tmp_path / "a.gguf", small_checkpoint)
    assert (found.facts.text, found.facts.tokens, found.facts.window, found.facts.hessian) == ("one.txt, two.txt", 120, 24, False)
    assert found.residual_peak is None and found.token_counts is None
    assert found.facts.inputs == small_statistics.facts.inputs
    for spec in small_checkpoint.config.weights():
        theirs, ours = found.moments(spec), small_statistics.moments(spec)
        assert (theirs is None) == (ours is None)
        if theirs is not None and ours is not None:
            assert theirs.tokens == 120 and theirs.mean_abs is None and theirs.hessian is None
            torch.testing.assert_close(theirs.mean_square, ours.mean_square, rtol=1e-6, atol=0)


def test_another_models_matrix(small_checkpoint: MemoryCheckpoint, small_statistics: Statistics, tiny: Checkpoint, tmp_path: Path) -> None:
    write_importance(small_statistics, small_checkpoint.config, tmp_path / "a.gguf")
    with pytest.raises(ElmExportError, match="use one that was made for this model"):
        read_importance(tmp_path / "a.gguf", tiny)


def test_what_llama_cpp_cannot_hold(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    untied = random_checkpoint(replace(small_checkpoint.config, share_input_output_layers=False))
    statistics = collect(untied, sample_of(untied.config, windows=1))
    with pytest.raises(ElmExportError, match=r"llama\.cpp's openelm architecture cannot express this model"):
        write_importance(statistics, untied.config, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(small_checkpoint: MemoryCheckpoint, small_statistics: Statistics, tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=f"cannot write {tmp_path}: Is a directory"):
        write_importance(small_statistics, small_checkpoint.config, tmp_path)


@pytest.fixture(scope="module")
def float_model(tiny_artifact: MadeOnce) -> Path:
    (path,) = tiny_artifact("gguf", "fp32").glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def llama_imatrix(float_model: Path, llama_cpp_tools: LlamaCppTools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llama-imatrix` measures on the bundled calibration text, its caches in float32."""
    out = tmp_path_factory.mktemp("imatrix") / "theirs.gguf"
    text = files("calibration") / "texts" / "calibration.txt"
    options = ("-c", CHUNK, "-b", CHUNK, "--no-ppl", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--chunks", 16, "-t", 2)
    llama_cpp_tools.run("llama-imatrix", "-m", float_model, "-f", text, "-o", out, *options)
    return out


@pytest.fixture(scope="module")
def same_chunks(tiny: Checkpoint) -> Sample:
    """The chunks of `llama-imatrix`: consecutive tokens, BOS in the place of each chunk's first."""
    assert tiny.tokenizer_path is not None
    tokenizer = load_tokenizer(tiny.tokenizer_path)
    ids = np.array(tokenizer.encode(bundled_text("calibration")))[: 16 * CHUNK].reshape(16, CHUNK)
    ids[:, 0] = tokenizer.bos_id
    return Sample(ids, "calibration.txt")


@pytest.mark.slow
def test_close_to_llama_imatrix(tiny: Checkpoint, llama_imatrix: Path, same_chunks: Sample, tmp_path: Path) -> None:
    write_importance(collect(tiny, same_chunks), tiny.config, tmp_path / "ours.gguf")
    theirs, ours = read_imatrix(llama_imatrix), read_imatrix(tmp_path / "ours.gguf")
    assert set(ours.entries) - set(theirs.entries) == {"token_embd.weight"}
    assert (ours.chunks, ours.chunk_size) == (theirs.chunks, theirs.chunk_size) == (16, CHUNK)
    for name, expected in theirs.entries.items():
        np.testing.assert_allclose(ours.entries[name], expected, rtol=5e-5, err_msg=name)


@pytest.mark.slow
def test_reads_what_llama_imatrix_wrote(tiny: Checkpoint, llama_imatrix: Path, same_chunks: Sample) -> None:
    found, expected = read_importance(llama_imatrix, tiny), collect(tiny, same_chunks)
    assert found.facts.tokens == expected.facts.tokens == 16 * CHUNK
    assert found.facts.text.endswith("calibration.txt")
    assert found.moments(tiny.specs["transformer.token_embeddings.weight"]) is None  # which it leaves out
    spec = tiny.specs["transformer.layers.3.ffn.proj_2.weight"]
    theirs, ours = found.moments(spec), expected.moments(spec)
    assert theirs is not None and ours is not None
    torch.testing.assert_close(theirs.mean_square, ours.mean_square, rtol=5e-5, atol=0)


@pytest.mark.slow
def test_llama_quantize_takes_it(
    tiny: Checkpoint, float_model: Path, same_chunks: Sample, llama_cpp_tools: LlamaCppTools, tmp_path: Path
) -> None:
    """Every matrix finds its entry, the embedding too, and is quantized otherwise than without."""
    write_importance(collect(tiny, same_chunks), tiny.config, tmp_path / "ours.gguf")
    tools = llama_cpp_tools
    tools.run("llama-quantize", "--pure", float_model, tmp_path / "without.gguf", "Q4_0")
    said = tools.run("llama-quantize", "--pure", "--imatrix", tmp_path / "ours.gguf", float_model, tmp_path / "with.gguf", "Q4_0")
    assert "loaded 31 importance matrix entries" in said and "computed on 16 chunks" in said
    assert "did not find weights" not in said
    without = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "without.gguf").tensors}
    for tensor in GGUFReader(tmp_path / "with.gguf").tensors:
        assert np.array_equal(tensor.data, without[tensor.name]) == ("norm" in tensor.name), tensor.name


@pytest.mark.slow
def test_experts_close_to_llama_imatrix(llama_cpp_tools: LlamaCppTools, export_to: ExportTo, tmp_path: Path) -> None:
    """A slice for each expert, and its count of tokens."""
    checkpoint = open_checkpoint("tiny-moe")
    (model,) = export_to(checkpoint, "gguf", "fp32").glob("*.gguf")
    text = files("calibration") / "texts" / "weighting.txt"
    options = ("-c", CHUNK, "-b", CHUNK, "--no-ppl", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--chunks", 4, "-t", 2)
    llama_cpp_tools.run("llama-imatrix", "-m", model, "-f", text, "-o", tmp_path / "theirs.gguf", *options)
    tokenizer = open_tokenizer(checkpoint)
    assert tokenizer is not None
    ids = np.array(tokenizer.encode(text.read_text(encoding="utf-8")))[: 4 * CHUNK].reshape(4, CHUNK)
    write_importance(collect(checkpoint, Sample(ids, "prose.txt")), checkpoint.config, tmp_path / "ours.gguf")
    theirs, ours = ({tensor.name: tensor.data for tensor in GGUFReader(tmp_path / name).tensors} for name in ("theirs.gguf", "ours.gguf"))
    assert set(ours) - set(theirs) <= {f"output.weight.{kind}" for kind in ("in_sum2", "counts")}
    for name, expected in theirs.items():
        assert ours[name].size == expected.size
        np.testing.assert_allclose(ours[name].reshape(-1), expected.reshape(-1), rtol=2e-3, err_msg=name)
    counts = ours["blk.3.ffn_down_exps.weight.counts"]
    assert counts.size == 8 and counts.sum() == 2 * 4 * CHUNK
