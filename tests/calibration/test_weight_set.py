"""Weight sets: what is written is what is read; other models, other plans and damaged files are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from calibration.weight_set import METADATA_KEY, StoredWeights, WeightFacts, WeightSet, quantized_schemes, weight_writer
from elmexport.errors import ElmExportError
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.lut_codec import PalettizedTensor
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan, Recipe, Rule, resolve
from elmexport.quantization.schemes import CodedScheme, Float, find_scheme
from elmexport.weights import Role
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint

ROLES = {
    Role.ATTENTION_QKV: "int4-block32",
    Role.ATTENTION_OUT: "int4-asym-block32",
    Role.FFN_GATE_UP: "lut4-group8",
    Role.FFN_DOWN: "lut6-tensor",
}
NORM = "transformer.layers.1.attn_norm.weight"


@pytest.fixture
def plan(small_checkpoint: MemoryCheckpoint) -> Plan:
    rules = (*(Rule(find_scheme(name), frozenset({role})) for role, name in ROLES.items()), Rule(find_scheme("int8-block32")))
    return resolve(
        Recipe("mix", "all kinds", Float("fp32"), Float("fp32"), Float("fp16"), Float("fp16"), 1.0, rules), small_checkpoint.config
    )


@pytest.fixture
def path(small_checkpoint: MemoryCheckpoint, plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    schemes = quantized_schemes(plan)
    facts = WeightFacts("small", small_checkpoint.identity(), schemes, (NORM,), "gptq", True, "a text", "00", 5, "0")
    with weight_writer(path, facts, small_checkpoint.specs) as writer:
        for name in reversed(schemes):  # in any order
            scheme = plan.schemes[name]
            assert isinstance(scheme, CodedScheme)
            writer.add(small_checkpoint.specs[name], quantize(small_checkpoint.tensor(name), scheme))
        writer.add_norm(NORM, small_checkpoint.tensor(NORM))
    return path


@pytest.mark.slow
def test_what_is_written_is_what_is_read(path: Path, plan: Plan, small_checkpoint: MemoryCheckpoint) -> None:
    weights = WeightSet.load(path)
    weights.check(small_checkpoint, plan)
    kinds = set()
    for name, scheme in plan.schemes.items():
        if isinstance(scheme, CodedScheme):
            expected, found = quantize(small_checkpoint.tensor(name), scheme), weights.get(small_checkpoint.specs[name])
            assert type(found) is type(expected)
            assert found.scheme == scheme
            assert found.codes.dtype == expected.codes.dtype
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.dequantize(), expected.dequantize())
            kinds.add((type(found), isinstance(found, IntegerTensor) and found.zeros is not None))
    assert kinds == {(IntegerTensor, False), (IntegerTensor, True), (PalettizedTensor, False)}
    assert torch.equal(weights.norms()[NORM], small_checkpoint.tensor(NORM))


def test_codes_and_folded_norms_come_without_reading_the_source(path: Path, plan: Plan, small_checkpoint: MemoryCheckpoint) -> None:
    class Watched(MemoryCheckpoint):
        def read(self, name: str) -> torch.Tensor:
            read.append(name)
            if name in quantized_schemes(plan) or name == NORM:
                raise OSError(f"{name} was read")
            return super().read(name)

    read: list[str] = []
    checkpoint = Watched(small_checkpoint.config, small_checkpoint.arrays)
    source = StoredWeights(checkpoint, plan, WeightSet.load(path))
    for name, spec in source.specs.items():
        weight, twice = source.get(spec), source.scaled(spec, 2.0)
        values = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
        doubled = twice.weight if isinstance(twice.weight, torch.Tensor) else twice.weight.dequantize()
        assert twice.rest == 1 and torch.equal(doubled, values * 2), name
    assert set(read) == set(source.specs) - set(quantized_schemes(plan)) - {NORM}


def test_safetensors_own_reader_takes_the_file_and_4_bit_codes_take_4_bits(path: Path, small_checkpoint: MemoryCheckpoint) -> None:
    tensors = load_file(path)
    name = "transformer.layers.0.attn.qkv_proj.weight"
    assert tensors[f"{name}.codes"].numel() == small_checkpoint.specs[name].size // 2


def test_weights_of_another_model_are_refused(path: Path, plan: Plan, small_checkpoint: MemoryCheckpoint) -> None:
    other = random_checkpoint(small_checkpoint.config, seed=1)
    with pytest.raises(ElmExportError, match="holds the weights of another model: small, identity"):
        WeightSet.load(path).check(other, plan)


def test_weights_of_another_plan_are_refused(path: Path, small_checkpoint: MemoryCheckpoint) -> None:
    rules = (Rule(find_scheme("int8-channel")),)
    recipe = Recipe("other", "", Float("fp32"), Float("fp32"), Float("fp16"), Float("fp16"), 1.0, rules)
    with pytest.raises(ElmExportError, match=r"holds .* as int4-asym-block32, while --quant other stores it as int8-channel"):
        WeightSet.load(path).check(small_checkpoint, resolve(recipe, small_checkpoint.config))


def test_damaged_and_foreign_files_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"cannot read .*missing\.safetensors"):
        WeightSet.load(tmp_path / "missing.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ElmExportError, match="holds no calibrated weights; make one with --save-weights"):
        WeightSet.load(foreign)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(ElmExportError, match="truncated or damaged"):
        WeightSet.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["codes", "scales", "zeros", "tables"])
def test_a_missing_part_is_damage(path: Path, plan: Plan, small_checkpoint: MemoryCheckpoint, part: str) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith(part))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, metadata)
    with pytest.raises(ElmExportError, match=f"is damaged: it lacks {lost}; make one with --save-weights"):
        WeightSet.load(path).check(small_checkpoint, plan)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "layers.0.attn.qkv_proj.weight",
            "layers.0.attn.qkv_pro.weight",
            r"is damaged: it lists transformer\.layers\.0\.attn\.qkv_pro\.weight",
        ),
        (NORM, "transformer.norms.weight", r"is damaged: it lists transformer\.norms\.weight, which the model does not have"),
        ('"distilled":null', '"distilled":{"after":1.0}', "its metadata lacks the divergences before and after distillation"),
    ],
)
def test_facts_that_do_not_fit_are_damage(
    path: Path, plan: Plan, small_checkpoint: MemoryCheckpoint, old: str, new: str, message: str
) -> None:
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()[METADATA_KEY].replace('": ', '":')
    assert old in facts
    save_file(load_file(path), path, {METADATA_KEY: facts.replace(old, new)})
    with pytest.raises(ElmExportError, match=message):
        WeightSet.load(path).check(small_checkpoint, plan)


def _one_scale_a_row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :1].contiguous()


def _not_a_number(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.masked_fill(torch.arange(tensor.numel()).view(tensor.shape) == 3, float("nan"))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qkv_proj.weight.scales", _one_scale_a_row, r"qkv_proj\.weight\.scales is F16 \[\d+, 1\], where F16 \[\d+, 6\] belongs"),
        ("qkv_proj.weight.scales", torch.Tensor.float, "is F32 .*, where F16 .* belongs"),
        ("qkv_proj.weight.codes", lambda codes: codes[1:], r"codes is U8 \[.*\], where U8 \[.*\] belongs"),
        ("qkv_proj.weight.scales", _not_a_number, r"qkv_proj\.weight\.scales holds NaN or infinity"),
        ("proj_1.weight.tables", _not_a_number, r"proj_1\.weight\.tables holds NaN or infinity"),
        ("1.attn_norm.weight", _not_a_number, r"attn_norm\.weight holds NaN or infinity"),
        ("1.attn_norm.weight", lambda norm: norm[:1], r"attn_norm\.weight is F32 \[1\], where F32 \[192\] belongs"),
    ],
)
def test_parts_that_do_not_fit_the_model_are_damage(
    path: Path, plan: Plan, small_checkpoint: MemoryCheckpoint, part: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(part))
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path, metadata)
    with pytest.raises(ElmExportError, match=message):
        weights = WeightSet.load(path)
        weights.check(small_checkpoint, plan)
        source = StoredWeights(small_checkpoint, plan, weights)
        for spec in source.specs.values():
            source.get(spec)


def test_an_interrupted_writer_leaves_nothing(small_checkpoint: MemoryCheckpoint, plan: Plan, tmp_path: Path) -> None:
    facts = WeightFacts("small", "", quantized_schemes(plan), (), "gptq", True, "a text", "00", 5, "0")
    with pytest.raises(KeyboardInterrupt), weight_writer(tmp_path / "w" / "x.safetensors", facts, small_checkpoint.specs):
        raise KeyboardInterrupt
    assert list((tmp_path / "w").iterdir()) == []
