"""Look-up tables in packages: what coremltools reads back and what the executor computes are the palettized tensors, wherever rows are cut.

Recipes of users too: tables of any group for any matrix, integers in blocks of any size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibration.calibrate import make_sample
from calibration.collect import collect
from calibration.options import Calibrate, WeightOptions
from calibration.statistics import mean_square_of
from calibration.weight_set import WeightSet
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.evaluation.self_check import reference_pass
from elmexport.models import trace
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.progress import SilentProgress
from elmexport.quantization.lut_codec import PalettizedTensor
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import resolve
from elmexport.quantization.schemes import CodedScheme, Lut, PerGroupedChannel, find_scheme
from elmexport.runtimes import open_artifact
from elmexport.runtimes.coreml import open_runtime
from elmexport.weights import Role, WeightSpec
from targets.coreml import CoreMLTarget
from targets.coreml.packing import _cut, _tables
from tests.clients.readers import Weights, quantized_weights
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.reference import kl, reference_logits
from tests.targets.coreml.package_reader import Package

INTO_STREAM = (Role.ATTENTION_OUT, Role.FFN_DOWN)
UNCALIBRATED = WeightOptions(calibrate="none")  # alpha is 1/32


def recipe(folder: Path, **schemes: str) -> str:
    """A user's recipe: schemes by role, `rest` for all others."""
    head = {"name": "mine", "words": "mine", "max_self_check_kl": 5.0} | dict.fromkeys(
        ("activations", "norms", "scales", "fallback"), "fp16"
    )
    rules = [f'[[rule]]\nroles = ["{role}"]\nscheme = "{scheme}"' for role, scheme in schemes.items() if role != "rest"]
    path = folder / "mine.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
    path.write_text("\n".join([*lines, *rules, f'[[rule]]\nscheme = "{schemes["rest"]}"']), encoding="utf-8")
    return str(path)


def dequantized(checkpoint: MemoryCheckpoint, schemes: Mapping[str, str], *, calibrate: Calibrate = "none") -> Weights:
    """Every matrix as `quantize` gives it; with `calibrate` "auto" its errors weighted by what the reference pass of an export finds."""
    mean_square: Callable[[WeightSpec], torch.Tensor | None] | None = None
    if calibrate == "auto":
        graph, tokenizer = trace(checkpoint.config, checkpoint.config.max_context_length), load_tokenizer(checkpoint.tokenizer_path)
        mean_square = mean_square_of(reference_pass(checkpoint, graph, tokenizer, SilentProgress()).statistics.moments)
    weights: Weights = {}
    for spec in checkpoint.config.weights():
        if not spec.role.is_norm:
            scheme = find_scheme(schemes.get(spec.role, schemes["rest"]))
            assert isinstance(scheme, CodedScheme)
            weights[spec.name] = (
                quantize(checkpoint.tensor(spec.name), scheme, "mse", mean_square and mean_square(spec)).dequantize().numpy()
            )
    return weights


def assert_holds(artifact: Path, checkpoint: Checkpoint, expected: Weights) -> int:
    """Every weight is the expected one, times alpha where it writes to the stream and can take it; returns how many took it."""
    found = quantized_weights("coreml", artifact, checkpoint.config)
    alpha = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["alpha"]
    assert found.keys() == expected.keys()
    scaled = 0
    for name, weight in found.items():
        if not np.array_equal(weight, expected[name]):
            assert checkpoint.specs[name].role in INTO_STREAM, name
            assert np.array_equal(weight, expected[name] * np.float32(alpha)), name
            scaled += 1
    return scaled


def assert_computes(artifact: Path, checkpoint: MemoryCheckpoint, expected: Weights, ids: NDArray[np.int64]) -> None:
    """The executor without rounding agrees with float64 on the palettized weights: norms and RoPE tables in fp16 are what is left."""
    norms = {spec.name: checkpoint.arrays[spec.name] for spec in checkpoint.config.weights() if spec.role.is_norm}
    arrays = {**expected, **{name: norm.astype(np.float16).astype(np.float32) for name, norm in norms.items()}}
    reference = reference_logits(checkpoint.config, arrays, ids)
    assert kl(reference, open_runtime(artifact, precision="fp32").logits(ids)).max() < 1e-5
    assert kl(reference, open_artifact(artifact).logits(ids)).max() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [
        "lut4-group8",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lut4-tensor", "lut6-group32", "lut8-tensor")),
    ],
)
@pytest.mark.parametrize("calibrate", ["auto", "none"])
def test_every_matrix_in_tables(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, scheme: str, calibrate: Calibrate
) -> None:
    """The tied embedding too; with and without rescaling."""
    artifact = export_to(small_checkpoint, "coreml", recipe(tmp_path, rest=scheme), weights=WeightOptions(calibrate=calibrate))
    alpha = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["alpha"]
    assert alpha == {"auto": 1, "none": 1 / 32}[calibrate]
    expected = dequantized(small_checkpoint, {"rest": scheme}, calibrate=calibrate)
    assert_holds(artifact, small_checkpoint, expected)
    assert_computes(artifact, small_checkpoint, expected, np.arange(1, 70))


@pytest.mark.slow
def test_alpha_goes_into_tables_that_can_take_it(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path) -> None:
    """Tables of few significant bits can, whichever way the k-means falls; those of the other layers need the full 11 bits."""
    chosen = [name for name, spec in small_checkpoint.specs.items() if spec.role in INTO_STREAM and spec.layer in (1, 3)]
    arrays = dict(small_checkpoint.arrays)
    for name in chosen:
        arrays[name] = np.sign(arrays[name]) * np.float32(2**-4)
    checkpoint = MemoryCheckpoint(small_checkpoint.config, arrays)
    artifact = export_to(checkpoint, "coreml", recipe(tmp_path, rest="lut4-group8"), weights=UNCALIBRATED)
    expected = dequantized(checkpoint, {"rest": "lut4-group8"})
    assert_holds(artifact, checkpoint, expected)
    found = quantized_weights("coreml", artifact, checkpoint.config)
    for name in expected:
        assert np.array_equal(found[name], expected[name]) == (name not in chosen), name
    assert_computes(artifact, checkpoint, expected, np.arange(1, 70))


@pytest.mark.slow
def test_a_table_too_wide_is_cut_between_groups(small_config: OpenELMConfig, export_to: ExportTo, tmp_path: Path) -> None:
    config = dataclasses.replace(small_config, vocab_size=40000, num_transformer_layers=1, qkv_multipliers=1.0, ffn_multipliers=1.0)
    checkpoint = random_checkpoint(config)
    artifact = export_to(checkpoint, "coreml", recipe(tmp_path, embedding="lut4-group64", rest="int8-channel"), weights=UNCALIBRATED)
    expected = dequantized(checkpoint, {"embedding": "lut4-group64", "rest": "int8-channel"})
    assert_holds(artifact, checkpoint, expected)
    assert_computes(artifact, checkpoint, expected, np.array([0, 13311, 13312, 13333, 26623, 26624, 39999]))
    package = Package(artifact)
    parts = [package.operation("decode", f"transformer_token_embeddings_weight_part{i}").inputs for i in range(3)]
    rows, groups = ([package.array(part[key].arguments[0].value).shape[0] for part in parts] for key in ("indices", "lut"))
    assert rows == [64 * group for group in groups]  # no table is stored twice
    assert sum(rows) == 40000


@pytest.mark.slow
def test_gate_and_up_may_share_a_group(small_config: OpenELMConfig, export_to: ExportTo, tmp_path: Path) -> None:
    """A feed-forward width that is no multiple of the group: the group in the middle has rows of both."""
    config = dataclasses.replace(small_config, ffn_dim_divisor=4, ffn_multipliers=(0.52, 0.7, 0.65))
    assert {layer.ffn_dim % 8 for layer in config.layers} == {0, 4}
    checkpoint = random_checkpoint(config)
    artifact = export_to(checkpoint, "coreml", recipe(tmp_path, rest="lut4-group8"), weights=UNCALIBRATED)
    expected = dequantized(checkpoint, {"rest": "lut4-group8"})
    assert_holds(artifact, checkpoint, expected)
    assert_computes(artifact, checkpoint, expected, np.arange(1, 70))


@given(data=st.data(), group=st.integers(1, 12), groups=st.integers(1, 12))
def test_tables_of_any_rows(data: Any, group: int, groups: int) -> None:
    rows = group * groups
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    entries = torch.arange(groups * 16, dtype=torch.float16).view(groups, 16)
    codes = torch.zeros(rows, 3, dtype=torch.uint8)
    tables = _tables(PalettizedTensor(Lut(4, PerGroupedChannel(group)), codes, entries), slice(start, stop))
    assert (stop - start) % len(tables) == 0
    each_row = np.repeat(tables, (stop - start) // len(tables), axis=0)
    assert np.array_equal(each_row, entries.numpy().repeat(group, axis=0)[start:stop])


@given(size=st.integers(1, 60000), pieces=st.sampled_from([1, 2]), group=st.sampled_from([1, 8, 32, 1000, 16384, 20000]))
def test_cuts(size: int, pieces: int, group: int) -> None:
    rows = size * pieces
    bounds = _cut(rows, pieces, group)
    starts = [start for start, _ in bounds]
    assert [stop for _, stop in bounds] == [*starts[1:], rows] and starts[0] == 0
    assert all(0 < stop - start <= 16384 for start, stop in bounds)
    assert {piece * size for piece in range(pieces)} <= set(starts)
    assert group > 16384 or all(start % size % group == 0 for start in starts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schemes",
    [
        {"rest": "int8-block32"},
        {"embedding": "int8-block64", "attention.qkv": "int4-block64", "rest": "int4-block16"},
        {"rest": "int4-channel"},
    ],
)
def test_integers_in_blocks_of_other_sizes(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, schemes: dict[str, str]
) -> None:
    artifact = export_to(small_checkpoint, "coreml", recipe(tmp_path, **schemes), weights=UNCALIBRATED, verify=True)
    expected = dequantized(small_checkpoint, schemes)
    assert_holds(artifact, small_checkpoint, expected)
    assert_computes(artifact, small_checkpoint, expected, np.arange(1, 70))


@pytest.mark.slow
def test_statistics_weigh_the_k_means(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path) -> None:
    statistics = collect(small_checkpoint, make_sample(small_checkpoint, tokens=512))
    statistics.save(tmp_path / "statistics.safetensors")
    options = WeightOptions(calibrate=tmp_path / "statistics.safetensors")
    artifact = export_to(small_checkpoint, "coreml", "lut4", weights=options)
    plan = resolve(CoreMLTarget().recipe("lut4"), small_checkpoint.config)
    expected, plain = {}, {}
    for name, scheme in plan.schemes.items():
        spec, weight = small_checkpoint.specs[name], small_checkpoint.tensor(name)
        if isinstance(scheme, CodedScheme):
            expected[name] = (
                quantize(weight, scheme, "mse", mean_square_of(statistics.moments)(spec) if spec.role is not Role.EMBEDDING else None)
                .dequantize()
                .numpy()
            )
            plain[name] = quantize(weight, scheme).dequantize().numpy()
    assert_holds(artifact, small_checkpoint, expected)
    assert not any(np.array_equal(plain[name], expected[name]) for name in plain if small_checkpoint.specs[name].role is not Role.EMBEDDING)


@pytest.mark.slow
def test_gptq_s_tables_are_those_of_the_artifact(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELMEXPORT_CACHE", str(tmp_path / "cache"))
    options = WeightOptions(method="gptq", tokens=1024, save_weights_to=tmp_path / "weights.safetensors")
    artifact = export_to(small_checkpoint, "coreml", "lut4", weights=options, verify=True)
    weights = WeightSet.load(tmp_path / "weights.safetensors")
    found = {spec.name: weights.get(spec) for spec in small_checkpoint.config.weights() if not spec.role.is_norm}
    assert {type(weight) for name, weight in found.items() if small_checkpoint.specs[name].layer is not None} == {PalettizedTensor}
    assert_holds(artifact, small_checkpoint, {name: weight.dequantize().numpy() for name, weight in found.items()})


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["lut4", "lut6", "lut8"])
def test_tiny_passes_its_self_check_with_room(tiny: Checkpoint, export_to: ExportTo, quant: str) -> None:
    artifact = export_to(tiny, "coreml", quant, verify=True)
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["self_check"]["kl_mean"] < CoreMLTarget().recipe(quant).max_self_check_kl / 10
    # What is no weight: tables of angles, four times, and of places, and a head of 64 bytes and alignment for each.
    config = tiny.config
    others = 4 * config.max_context_length * config.head_dim * 2
    stored = next(artifact.rglob("weight.bin")).stat().st_size - others
    assert 1 <= stored / (manifest["bits_per_weight"] * manifest["model"]["parameters"] / 8) < 1.02


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["lut4", "lut6", "lut8"])
def test_coremltools_saves_the_package_anew(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, quant: str) -> None:
    artifact = export_to(small_checkpoint, "coreml", quant)
    (package,) = artifact.glob("*.mlpackage")
    saved = tmp_path / "saved.mlpackage"
    ct.models.MLModel(str(package), skip_model_load=True).save(str(saved))
    ids = np.arange(1, 70)
    np.testing.assert_array_equal(open_artifact(saved).logits(ids), open_artifact(package).logits(ids))
