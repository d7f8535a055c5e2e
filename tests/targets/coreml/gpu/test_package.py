"""What coremltools sees in the packages for GPUs: swift-transformers' inputs, states and output, operations, weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.options import WeightOptions
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import resolve
from elmexport.quantization.schemes import Float, Integer, PerBlock
from elmexport.runtimes import open_artifact
from elmexport.weights import Role
from targets.coreml import CoreMLTarget
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.targets.coreml.package_reader import Package, shape

QUANTS = ("fp16", "int8", "int4", "lut4", "lut8")
GPU = {"device": "gpu"}

PackageOf = Callable[..., Package]


@pytest.fixture(scope="module")
def package(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> PackageOf:
    """`package(quant, checkpoint)`, each made once; without calibration, so alpha is 1/32."""
    made: dict[tuple[str, Checkpoint | None], Package] = {}

    def call(quant: str, checkpoint: Checkpoint | None = None) -> Package:
        key = (quant, checkpoint)
        if key not in made:
            made[key] = Package(
                export_to(checkpoint or small_checkpoint, "coreml", quant, settings=GPU, weights=WeightOptions(calibrate="none"))
            )
        return made[key]

    return call


def variant(config: OpenELMConfig, **changes: object) -> MemoryCheckpoint:
    return random_checkpoint(dataclasses.replace(config, **changes))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_the_contract_of_swift_transformers(package: PackageOf, small_config: OpenELMConfig, quant: str) -> None:
    """Names, element types and ranges, as its LanguageModel.swift reads them."""
    spec = package(quant).spec
    description = spec.description
    assert spec.specificationVersion == 9  # iOS 18
    assert [*spec.mlProgram.functions] == ["main"]
    assert spec.mlProgram.functions["main"].opset == "CoreML8"
    inputs = {feature.name: feature.type.multiArrayType for feature in description.input}
    ranges = {name: [(r.lowerBound, r.upperBound) for r in kind.shapeRange.sizeRanges] for name, kind in inputs.items()}
    one, flexible = (1, 1), (1, 128)
    assert ranges == {"inputIds": [one, flexible], "causalMask": [one, one, flexible, flexible]}
    assert {name: list(kind.shape) for name, kind in inputs.items()} == {"inputIds": [1, 1], "causalMask": [1, 1, 1, 1]}
    kinds = type(inputs["inputIds"])
    assert inputs["inputIds"].dataType == kinds.INT32
    assert inputs["causalMask"].dataType == kinds.FLOAT16
    heads = sum(layer.kv_heads for layer in small_config.layers)
    states = {feature.name: feature.type.stateType.arrayType for feature in description.state}
    assert {name: (list(kind.shape), kind.dataType) for name, kind in states.items()} == {
        name: ([1, heads, 128, small_config.head_dim], kinds.FLOAT16) for name in ("keyCache", "valueCache")
    }
    (logits,) = description.output
    assert (logits.name, logits.type.multiArrayType.dataType) == ("logits", kinds.FLOAT16)
    assert shape(package(quant).operation("main", "logits").outputs[0].type)[::2] == (1, small_config.vocab_size)
    assert all(feature.shortDescription for feature in (*description.input, *description.state, *description.output))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("OpenELM-450M-Instruct", "apple/OpenELM-450M-Instruct"), ("mine", "mine")])
def test_metadata(name: str, expected: str, small_config: OpenELMConfig, export_to: ExportTo) -> None:
    checkpoint = random_checkpoint(small_config)
    checkpoint.source = dataclasses.replace(checkpoint.source, name=name)
    metadata = dict(Package(export_to(checkpoint, "coreml", "int4", settings=GPU)).model.user_defined_metadata)
    assert metadata["co.huggingface.exporters.name"] == expected
    assert json.loads(metadata["elmexport.config"]) == small_config.to_dict()
    assert (metadata["elmexport.quant"], metadata["elmexport.context"]) == ("int4", "128")


@pytest.mark.parametrize("quant", QUANTS)
def test_attention_is_fused_and_projections_are_linear(package: PackageOf, small_config: OpenELMConfig, quant: str) -> None:
    operations = package(quant).operations("main")
    counts = {
        kind: sum(op.type == kind for op in operations) for kind in ("scaled_dot_product_attention", "linear", "conv", "matmul", "softmax")
    }
    layers = small_config.num_transformer_layers
    assert counts == {"scaled_dot_product_attention": layers, "linear": 4 * layers + 1, "conv": 0, "matmul": 0, "softmax": 0}


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_weights_read_by_coremltools_are_the_quantized_ones(package: PackageOf, small_checkpoint: MemoryCheckpoint, quant: str) -> None:
    found = package(quant)
    plan = resolve(CoreMLTarget(device="gpu").recipe(quant), small_checkpoint.config)
    for spec in small_checkpoint.config.weights():
        scheme, weight = plan.schemes[spec.name], small_checkpoint.tensor(spec.name)
        values = found.weight("main", spec.name)
        into_stream = spec.role in (Role.ATTENTION_OUT, Role.FFN_DOWN)
        if isinstance(scheme, Float):
            expected = (weight * (1 / 32 if into_stream else 1)).to(torch.float16).float().numpy()
            assert np.array_equal(values, expected), spec.name
        else:
            # Where fp16 scales or table entries would lose bits to alpha, they stay as they are, and the input is multiplied.
            exact = quantize(weight, scheme).dequantize().numpy()
            assert np.array_equal(values, exact) or (into_stream and np.array_equal(values, exact / 32)), spec.name


def test_the_recipes_of_the_device() -> None:
    """int8 in blocks here, one scale a channel for the Neural Engine; what has no recipe of its own is common."""
    gpu, engine = CoreMLTarget(device="gpu"), CoreMLTarget()
    (rule,) = gpu.recipe("int8").rules
    assert rule.scheme == Integer(8, PerBlock(32))
    assert engine.recipe("int8").rules != gpu.recipe("int8").rules
    assert [rule.scheme for rule in gpu.recipe("int4").rules] == [Integer(8, PerBlock(32)), Integer(4, PerBlock(32))]
    assert gpu.recipe("lut4") == engine.recipe("lut4")
    assert gpu.recipe("fp16") == engine.recipe("fp16")
    with pytest.raises(ElmExportError, match="--quant q4_0 is not available for coreml"):
        gpu.recipe("q4_0")


def test_a_tied_table_lies_in_the_file_once(package: PackageOf) -> None:
    found = package("int8")
    name = "transformer_token_embeddings_weight"
    users = [op.type for op in found.operations("main") for arg in op.inputs.values() for b in arg.arguments if b.name == name]
    assert sorted(users) == ["gather", "linear"]


def test_wide_matrices_stay_whole(small_config: OpenELMConfig, package: PackageOf) -> None:
    """GPUs have no limit of 16384; the Neural Engine form cuts such a table."""
    checkpoint = variant(small_config, vocab_size=40000, num_transformer_layers=1, qkv_multipliers=1.0, ffn_multipliers=1.0)
    assert package("int8", checkpoint).weight("main", "transformer.token_embeddings.weight").shape == (40000, 192)
    CoreMLTarget(device="gpu").check(dataclasses.replace(small_config, ffn_multipliers=100.0), 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"normalize_qk_projections": False}, {"share_input_output_layers": False}, {"ffn_with_glu": False}, {"num_gqa_groups": 1}],
    ids=str,
)
def test_options_of_the_configuration(small_config: OpenELMConfig, export_to: ExportTo, changes: dict[str, object]) -> None:
    """The export checks itself against the model, and fails where they differ."""
    export_to(variant(small_config, **changes), "coreml", "fp16", settings=GPU, verify=True)


@pytest.mark.slow
def test_a_tensor_that_does_not_fit_its_scheme_stays_fp16(small_config: OpenELMConfig, export_to: ExportTo) -> None:
    config = dataclasses.replace(small_config, model_dim=200, qkv_multipliers=0.96, ffn_multipliers=0.96)
    artifact = export_to(random_checkpoint(config), "coreml", "int4", settings=GPU, verify=True)
    assert Package(artifact).operation("main", "transformer_layers_0_attn_qkv_proj_weight").type == "const"


@pytest.mark.slow
def test_coremltools_parses_and_type_checks_the_whole_program(package: PackageOf) -> None:
    from coremltools.converters.mil.frontend.milproto.load import load

    for quant in QUANTS:
        found = package(quant)
        assert set(load(found.spec, 9, found.model.weights_dir).functions) == {"main"}


def test_the_package_survives_loading_and_saving(small_checkpoint: MemoryCheckpoint, package: PackageOf, tmp_path: Path) -> None:
    found = package("int4")
    found.model.save(str(tmp_path / "saved.mlpackage"))
    ids = np.arange(1, 40) % small_checkpoint.config.vocab_size
    np.testing.assert_array_equal(open_artifact(tmp_path / "saved.mlpackage").logits(ids), open_artifact(found.path).logits(ids))


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int4", pytest.param("lut4", marks=pytest.mark.slow)])
def test_same_inputs_same_bytes(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, quant: str) -> None:
    first = export_to(small_checkpoint, "coreml", quant, settings=GPU)
    export_to(small_checkpoint, "coreml", "fp16")  # what was built in between must not matter
    assert digests(first) == digests(export_to(small_checkpoint, "coreml", quant, settings=GPU))


def digests(artifact: Path) -> dict[str, str]:
    paths = sorted(path for path in artifact.rglob("*") if path.is_file())
    return {path.relative_to(artifact).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_tokenizer_for_swift_transformers(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    """It reads config.json, tokenizer.json and tokenizer_config.json; transformers reads the same two, and gives SentencePiece's ids."""
    import sentencepiece
    from transformers import AutoTokenizer

    artifact = export_to(small_checkpoint, "coreml", "fp16", settings=GPU)
    files = {path.name for path in artifact.iterdir()}
    assert files == {
        "README.md", "small-fp16.mlpackage", "config.json", "manifest.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert json.loads((artifact / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(artifact / "tokenizer.model"))
    text = "The river ran on, and the year 1873 began."
    assert AutoTokenizer.from_pretrained(artifact)(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]
