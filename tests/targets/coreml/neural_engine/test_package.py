"""What coremltools sees in the packages: functions, states, shapes, operations, weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.options import WeightOptions
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.models import read_config
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import resolve
from elmexport.quantization.schemes import Float, Integer, PerChannel
from elmexport.runtimes import open_artifact
from elmexport.weights import Role
from targets.coreml import CoreMLTarget
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.targets.coreml.package_reader import Package, shape

QUANTS = ("fp16", "int8", "int4", "lut4", "lut6", "lut8")
FUNCTIONS = {"prefill": 64, "decode": 1}
# What the Neural Engine form may be made of. The second group handles positions and token ids, before the first layer; the third, of
# packages that give the most likely token, comes behind the head.
LAYER_OPERATIONS = (
    "const constexpr_blockwise_shift_scale constexpr_lut_to_dense conv matmul softmax silu mul add real_div abs maximum reduce_max reduce_mean rsqrt concat split "
    "slice_by_index slice_update read_state write_state reshape transpose squeeze gather"
)
INDEX_OPERATIONS = "cast equal greater greater_equal minimum select sub"
TOKEN_OPERATIONS = "reduce_argmax"
OPERATIONS = {*LAYER_OPERATIONS.split(), *INDEX_OPERATIONS.split()}

PackageOf = Callable[..., Package]


@pytest.fixture(scope="module")
def package(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> PackageOf:
    """`package(quant, checkpoint, **options)`, each made once; without calibration, so alpha is 1/32."""
    made: dict[tuple[str, Checkpoint | None, str], Package] = {}

    def call(quant: str, checkpoint: Checkpoint | None = None, **options: object) -> Package:
        key = (quant, checkpoint, str(options))
        if key not in made:
            made[key] = Package(
                export_to(checkpoint or small_checkpoint, "coreml", quant, weights=WeightOptions(calibrate="none"), **options)
            )
        return made[key]

    return call


@pytest.fixture(scope="module")
def wide_checkpoint(small_config: OpenELMConfig) -> MemoryCheckpoint:
    """A vocabulary that the Neural Engine cannot take in one piece."""
    return random_checkpoint(
        dataclasses.replace(small_config, vocab_size=40000, num_transformer_layers=1, qkv_multipliers=1.0, ffn_multipliers=1.0)
    )


def variant(config: OpenELMConfig, **changes: object) -> MemoryCheckpoint:
    return random_checkpoint(dataclasses.replace(config, **changes))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_functions_states_and_shapes(package: PackageOf, small_config: OpenELMConfig, quant: str) -> None:
    spec = package(quant).spec
    heads = sum(layer.kv_heads for layer in small_config.layers)
    assert spec.specificationVersion == 9  # iOS 18
    assert spec.description.defaultFunctionName == "decode"
    assert {function.name for function in spec.description.functions} == set(FUNCTIONS) == set(spec.mlProgram.functions)
    for function in spec.description.functions:
        tokens = FUNCTIONS[function.name]
        inputs = {feature.name: feature.type.multiArrayType for feature in function.input}
        states = {feature.name: feature.type.stateType.arrayType for feature in function.state}
        (logits,) = function.output
        last = {"last_token": [1]} if tokens > 1 else {}
        assert {name: list(kind.shape) for name, kind in inputs.items()} == {"input_ids": [1, tokens], "position": [1], **last}
        assert {name: list(kind.shape) for name, kind in states.items()} == {
            name: [1, heads, 128, small_config.head_dim] for name in ("key_cache", "value_cache")
        }
        assert (logits.name, list(logits.type.multiArrayType.shape)) == ("logits", [1, 1, small_config.vocab_size])
        kinds = type(logits.type.multiArrayType)
        assert {kind.dataType for kind in inputs.values()} == {kinds.INT32}
        assert {kind.dataType for kind in states.values()} == {kinds.FLOAT16} == {logits.type.multiArrayType.dataType}
        assert all(feature.shortDescription for feature in (*function.input, *function.state, *function.output))
        assert spec.mlProgram.functions[function.name].opset == "CoreML8"


@pytest.mark.slow
def test_a_short_context_shortens_prefill(package: PackageOf) -> None:
    functions = {function.name: function for function in package("fp16", context=32).spec.description.functions}
    assert list(functions["prefill"].input[0].type.multiArrayType.shape) == [1, 32]


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "settings"), [*((quant, {}) for quant in QUANTS), ("fp16", {"kv": "io"}), ("fp16", {"argmax": True})])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_obeys_the_rules_of_the_neural_engine(
    package: PackageOf, wide_checkpoint: MemoryCheckpoint, quant: str, settings: dict[str, object], function: str
) -> None:
    allowed = OPERATIONS | ({TOKEN_OPERATIONS} if settings.get("argmax") else set())
    for found in (package(quant, settings=settings), package(quant, wide_checkpoint, settings=settings)):
        for op in found.operations(function):
            assert op.type in allowed, op.type
            for output in op.outputs:
                size = shape(output.type)
                assert len(size) <= 5, (op.type, output.name, size)
                assert max(size, default=1) <= 16384, (op.type, output.name, size)


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_weights_read_by_coremltools_are_the_quantized_ones(package: PackageOf, small_checkpoint: MemoryCheckpoint, quant: str) -> None:
    found = package(quant)
    plan = resolve(CoreMLTarget().recipe(quant), small_checkpoint.config)
    for spec in small_checkpoint.config.weights():
        scheme, weight = plan.schemes[spec.name], small_checkpoint.tensor(spec.name)
        values = found.weight("decode", spec.name)
        into_stream = spec.role in (Role.ATTENTION_OUT, Role.FFN_DOWN)
        if isinstance(scheme, Float):
            expected = (weight * (1 / 32 if into_stream else 1)).to(torch.float16).float().numpy()
            assert np.array_equal(values, expected), spec.name
        else:
            # Where fp16 scales or table entries would lose bits to alpha, they stay as they are, and the input is multiplied.
            exact = quantize(weight, scheme).dequantize().numpy()
            assert np.array_equal(values, exact) or (into_stream and np.array_equal(values, exact / 32)), spec.name


@pytest.mark.slow
def test_the_recipes_give_what_they_say(package: PackageOf) -> None:
    def kinds(quant: str, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        inputs = package(quant).operation("decode", name).inputs
        keys = ("indices", "lut") if "lut" in inputs else ("data", "scale")
        data, scale = (inputs[key].arguments[0].value.type for key in keys)
        return (
            data.tensorType.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number[data.tensorType.dataType].name,
            shape(data),
            shape(scale),
        )

    table, projection = "transformer_token_embeddings_weight", "transformer_layers_1_attn_out_proj_weight"
    assert kinds("int4", table) == ("INT8", (512, 192, 1, 1), (512, 6, 1, 1))
    assert kinds("int4", projection) == ("INT4", (192, 192, 1, 1), (192, 6, 1, 1))
    assert kinds("int8", table) == ("INT8", (512, 192, 1, 1), (512, 1, 1, 1))
    assert kinds("int8", projection) == ("INT8", (192, 192, 1, 1), (192, 1, 1, 1))
    assert kinds("lut4", table) == kinds("lut6", table) == kinds("lut8", table) == kinds("int8", table)
    assert kinds("lut4", projection) == ("UINT4", (192, 192, 1, 1), (24, 1, 1, 1, 16, 1))
    assert kinds("lut6", projection) == ("UINT6", (192, 192, 1, 1), (12, 1, 1, 1, 64, 1))
    assert kinds("lut8", projection) == ("UINT8", (192, 192, 1, 1), (1, 1, 1, 1, 256, 1))


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_the_functions_share_one_copy_of_every_weight(
    package: PackageOf, small_checkpoint: MemoryCheckpoint, wide_checkpoint: MemoryCheckpoint, quant: str
) -> None:
    for found, checkpoint in ((package(quant), small_checkpoint), (package(quant, wide_checkpoint), wide_checkpoint)):
        prefill, decode = ({value.blobFileValue.offset for value in found.blobs(name)} for name in FUNCTIONS)
        assert decode <= prefill  # prefill has one constant more: the offsets of its tokens
        specs = list(checkpoint.config.weights())
        plan = resolve(CoreMLTarget().recipe(quant), checkpoint.config)
        bits = sum(plan.schemes[spec.name].bits(spec.shape) for spec in specs)
        tables = sum(
            found.array(value).nbytes for value in found.blobs("decode") if len(shape(value.type)) == 4 and shape(value.type)[:2] == (1, 1)
        )
        slack = 128 * (len(prefill) + 1)  # a record of 64 bytes and alignment to 64 for each
        assert bits // 8 <= found.weight_file.stat().st_size <= bits // 8 + tables + slack


def test_a_tied_table_lies_in_the_file_once(package: PackageOf, wide_checkpoint: MemoryCheckpoint) -> None:
    found = package("int8", wide_checkpoint)
    parts = [op.outputs[0].name for op in found.operations("decode") if op.outputs and "token_embeddings" in op.outputs[0].name]
    names = [f"transformer_token_embeddings_weight_part{i}" for i in range(3)]
    assert sorted(parts) == sorted([*names, *(f"{name}_rows" for name in names)])
    users = {(op.type, arg.arguments[0].name) for op in found.operations("decode") for arg in op.inputs.values() if len(arg.arguments) == 1}
    for name in names:
        assert {("gather", f"{name}_rows"), ("conv", name)} <= users
        table, weight = (found.operation("decode", part).inputs for part in (f"{name}_rows", name))
        for key in ("data", "scale"):
            first, second = (part[key].arguments[0].value.blobFileValue.offset for part in (table, weight))
            assert first == second


def test_metadata(package: PackageOf, small_config: OpenELMConfig) -> None:
    metadata = dict(package("int4").model.user_defined_metadata)
    assert json.loads(metadata["elmexport.config"]) == small_config.to_dict()
    assert metadata["elmexport.context"] == "128"
    assert metadata["elmexport.quant"] == "int4"
    assert float(metadata["elmexport.alpha"]) == 1 / 32
    assert json.loads(metadata["elmexport.functions"]) == FUNCTIONS
    assert (metadata["elmexport.kv"], metadata["elmexport.outputs"]) == ("state", "logits")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"normalize_qk_projections": False}, {"share_input_output_layers": False}, {"ffn_with_glu": False}, {"num_gqa_groups": 1}],
    ids=str,
)
def test_options_of_the_configuration(package: PackageOf, small_config: OpenELMConfig, changes: dict[str, object]) -> None:
    checkpoint = variant(small_config, **changes)
    found = package("fp16", checkpoint)
    for spec in checkpoint.config.weights():
        assert found.weight("prefill", spec.name).shape == spec.shape


@pytest.mark.slow
def test_a_tensor_that_does_not_fit_its_scheme_stays_fp16(small_config: OpenELMConfig, export_to: ExportTo) -> None:
    config = dataclasses.replace(small_config, model_dim=200, qkv_multipliers=0.96, ffn_multipliers=0.96)
    artifact = export_to(random_checkpoint(config), "coreml", "int4", weights=WeightOptions(calibrate="none"))
    assert Package(artifact).operation("decode", "transformer_layers_0_attn_qkv_proj_weight").type == "const"
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    assert "transformer.layers.0.attn.qkv_proj.weight" in {entry["tensor"] for entry in manifest["fallbacks"]}


@pytest.mark.slow
def test_coremltools_parses_and_type_checks_the_whole_program(package: PackageOf, wide_checkpoint: MemoryCheckpoint) -> None:
    from coremltools.converters.mil.frontend.milproto.load import load

    for checkpoint in (None, wide_checkpoint):
        for quant in ("int4", "lut4", "lut6", "lut8"):
            found = package(quant, checkpoint)
            program = load(found.spec, 9, found.model.weights_dir)
            assert set(program.functions) == set(FUNCTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int4", "lut4"])  # those of every quantization are in tests/artifact_bytes.json
def test_same_inputs_same_bytes(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, quant: str) -> None:
    first = export_to(small_checkpoint, "coreml", quant)
    export_to(small_checkpoint, "coreml", "fp16")  # what was built in between must not matter
    assert digests(first) == digests(export_to(small_checkpoint, "coreml", quant))


@pytest.mark.slow
def test_same_bytes_in_another_process(tiny: Checkpoint, export_to: ExportTo, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from elmexport.exporting import export; "
        "export('tiny', 'coreml', 'int4', out=Path(sys.argv[1]), verify=False)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    )
    assert digests(tmp_path / "out") == digests(export_to(tiny, "coreml", "int4"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"kv": "io", "prefill": 32}, {"argmax": True}], ids=str)
def test_other_forms_have_the_same_bytes_and_survive_coremltools(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, settings: dict[str, object]
) -> None:
    from coremltools.converters.mil.frontend.milproto.load import load

    first, second = (export_to(small_checkpoint, "coreml", "int4", settings=settings) for _ in range(2))
    assert digests(first) == digests(second)
    found = Package(first)
    assert set(load(found.spec, 9, found.model.weights_dir).functions) == set(FUNCTIONS)
    found.model.save(str(tmp_path / "saved.mlpackage"))
    saved, original = open_artifact(tmp_path / "saved.mlpackage"), open_artifact(found.path)
    assert [saved.greedy(range(1, count)) for count in (2, 40, 100)] == [original.greedy(range(1, count)) for count in (2, 40, 100)]


@pytest.mark.slow
def test_features_of_the_other_forms(package: PackageOf, small_config: OpenELMConfig) -> None:
    heads = sum(layer.kv_heads for layer in small_config.layers)
    for settings in ({"kv": "io", "prefill": 96}, {"argmax": True}):
        description = package("fp16", settings=settings).spec.description
        for function in description.functions:
            tokens = {"prefill": settings.get("prefill", 64), "decode": 1}[function.name]
            outputs = {feature.name: list(feature.type.multiArrayType.shape) for feature in function.output}
            inputs = {feature.name: list(feature.type.multiArrayType.shape) for feature in function.input}
            assert inputs["input_ids"] == [1, tokens]
            assert all(feature.shortDescription for feature in (*function.input, *function.state, *function.output))
            if "kv" in settings:
                new, cache = [1, heads, tokens, small_config.head_dim], [1, heads, 128, small_config.head_dim]
                assert outputs == {"logits": [1, 1, small_config.vocab_size], "new_keys": new, "new_values": new}
                assert not function.state and inputs["key_cache"] == inputs["value_cache"] == cache
            else:
                assert outputs == {"token": [1, 1], "value": [1, 1]}
                assert {feature.name for feature in function.state} == {"key_cache", "value_cache"}


def digests(artifact: Path) -> dict[str, str]:
    paths = sorted(path for path in artifact.rglob("*") if path.is_file())
    return {path.relative_to(artifact).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.slow
def test_files_of_the_artifact(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    artifact = export_to(small_checkpoint, "coreml", "int8")
    assert {path.name for path in artifact.iterdir()} == {
        "README.md", "small-int8.mlpackage", "config.json", "manifest.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert read_config(artifact / "config.json") == OpenELMConfig.from_dict(small_checkpoint.config.to_dict())


@pytest.mark.parametrize(
    ("context", "advice"), [(100, "--context 96 or 128"), (20, "--context 32"), (250, "--context 224 or 256"), (1000, "--context 256")]
)
def test_a_context_that_is_no_multiple_of_32(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, context: int, advice: str
) -> None:
    with pytest.raises(ElmExportError, match=f"context is {context}.*{advice}"):
        export_to(small_checkpoint, "coreml", "int4", context=context, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 48}, "head_dim is 48.*multiples of 32.*onnx or gguf"),
        ({"ffn_multipliers": 100.0}, "feed-forward width of layer 0 is 19200.*16384"),
        ({"model_dim": 16416}, "model_dim is 16416.*16384"),
    ],
)
def test_models_that_the_form_cannot_hold(small_config: OpenELMConfig, changes: dict[str, object], message: str) -> None:
    config = dataclasses.replace(small_config, **changes)  # type: ignore[arg-type]
    with pytest.raises(ElmExportError, match=message):
        CoreMLTarget().check(config, 128)


@pytest.mark.parametrize("device", ["neural-engine", "gpu"])
def test_fp32_is_refused(device: str) -> None:
    with pytest.raises(ElmExportError, match=r"fp32 is not available for coreml: the Neural Engine computes in fp16.*; choose int4"):
        CoreMLTarget(device=device).recipe("fp32")


def test_int8_recipe_is_per_channel() -> None:
    (rule,) = CoreMLTarget().recipe("int8").rules
    assert rule.scheme == Integer(8, PerChannel())
