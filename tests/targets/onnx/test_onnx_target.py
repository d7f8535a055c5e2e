"""The ONNX artifact: what lies in it, held against the format's own tools, a float64 forward pass, and plain onnxruntime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from calibration.options import WeightOptions
from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.exporting import export_checkpoint
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.recipes import resolve
from elmexport.quantization.schemes import find_scheme
from elmexport.quantization.weight_source import CheckpointWeights
from elmexport.runtimes import open_artifact
from elmexport.target import find_target
from elmexport.weights import Role
from targets.onnx import STEMS, OnnxTarget
from tests.clients.readers import quantized_weights
from tests.conftest import ExportTo, SmallArtifact
from tests.graph.test_forward import token_ids
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.reference import kl, log_probs, reference_logits

QUANTS = OnnxTarget.quants
QUANTIZED = tuple(quant for quant in QUANTS if quant.startswith("int"))
Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(small_artifact: SmallArtifact) -> Exported:
    """`exported(quant)`: the artifact of the small checkpoint, made once."""
    return partial(small_artifact, "onnx")


def model_path(folder: Path) -> Path:
    (path,) = folder.glob("onnx/*.onnx")
    return path


def logits_of(folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    return open_artifact(folder).logits(ids)


# The folder


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_folder(exported: Exported, small_checkpoint: MemoryCheckpoint, quant: str) -> None:
    folder = exported(quant)
    stem = STEMS[quant]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "README.md",
        "manifest.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        f"onnx/{stem}.onnx",
        f"onnx/{stem}.onnx_data",
    }
    assert json.loads((folder / "config.json").read_text()) == small_checkpoint.config.to_dict()
    assert small_checkpoint.tokenizer_path is not None
    assert (folder / "tokenizer.model").read_bytes() == small_checkpoint.tokenizer_path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_same_bytes_twice(exported: Exported, small_checkpoint: MemoryCheckpoint, export_to: ExportTo, quant: str) -> None:
    first, second = exported(quant), export_to(small_checkpoint, "onnx", quant)
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


# The model


def register_contrib_norm() -> None:
    """onnxruntime keeps SimplifiedLayerNormalization in ONNX's own domain, where onnx's checker knows no such operator."""
    from onnx.defs import OpSchema, get_schema, register_schema

    try:
        get_schema("SimplifiedLayerNormalization")
    except onnx.defs.SchemaError:
        parameter = OpSchema.FormalParameter
        register_schema(
            OpSchema(
                "SimplifiedLayerNormalization",
                "",
                1,
                inputs=[parameter("X", "T"), parameter("scale", "T")],
                outputs=[parameter("Y", "T")],
                type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
                attributes=[
                    OpSchema.Attribute("axis", OpSchema.AttrType.INT),
                    OpSchema.Attribute("epsilon", OpSchema.AttrType.FLOAT),
                    OpSchema.Attribute("stash_type", OpSchema.AttrType.INT),
                ],
            )
        )


@pytest.mark.parametrize("quant", QUANTS)
def test_checker_passes(exported: Exported, quant: str) -> None:
    register_contrib_norm()
    onnx.checker.check_model(model_path(exported(quant)), full_check=True)


@pytest.mark.parametrize("quant", QUANTS)
def test_interface(exported: Exported, small_config: OpenELMConfig, quant: str) -> None:
    graph = onnx.load(model_path(exported(quant)), load_external_data=False).graph

    def described(values: Any) -> dict[str, tuple[int, tuple[int | str, ...]]]:
        return {
            value.name: (
                value.type.tensor_type.elem_type,
                tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        }

    cache = onnx.TensorProto.FLOAT16 if quant == "fp16" else onnx.TensorProto.FLOAT
    inputs = {
        "input_ids": (onnx.TensorProto.INT64, ("batch_size", "sequence_length")),
        "attention_mask": (onnx.TensorProto.INT64, ("batch_size", "total_sequence_length")),
        "logits_to_keep": (onnx.TensorProto.INT64, ()),  # has a default
    }
    outputs = {"logits": (onnx.TensorProto.FLOAT, ("batch_size", 1, small_config.vocab_size))}
    for i, layer in enumerate(small_config.layers):
        for kind in ("key", "value"):
            inputs[f"past_key_values.{i}.{kind}"] = (cache, ("batch_size", layer.kv_heads, "past_sequence_length", small_config.head_dim))
            outputs[f"present.{i}.{kind}"] = (cache, ("batch_size", layer.kv_heads, "total_sequence_length", small_config.head_dim))
    assert described(graph.input) == inputs
    assert described(graph.output) == outputs


@pytest.mark.parametrize("quant", QUANTIZED)
def test_tied_table_is_stored_once(exported: Exported, quant: str) -> None:
    graph = onnx.load(model_path(exported(quant)), load_external_data=False).graph
    (gather,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    head = [node for node in graph.node if node.op_type == "MatMulNBits"][-1]
    assert gather.input[0] == head.input[1]
    assert {attribute.name: attribute.i for attribute in head.attribute}["bits"] == (4 if quant == "int4-all" else 8)


def test_native_operators(exported: Exported, small_config: OpenELMConfig) -> None:
    count = Counter(node.op_type for node in onnx.load(model_path(exported("int4")), load_external_data=False).graph.node)
    layers = small_config.num_transformer_layers
    assert count["MatMulNBits"] == 4 * layers + 1
    assert count["GroupQueryAttention"] == layers
    assert count["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert count["SimplifiedLayerNormalization"] == 2 * layers + 1  # the q/k norms, and the first, which has no residual before it
    assert count["Add"] == 2  # on token counts; the sums of the residual stream are inside the norms


# The weights


def wide_checkpoint(config: OpenELMConfig, **options: Any) -> MemoryCheckpoint:
    """Rows that divide into blocks of 128 in every matrix."""
    return random_checkpoint(replace(config, model_dim=384, head_dim=128, ffn_dim_divisor=128, **options), seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTIZED)
@pytest.mark.parametrize("tied", [True, False])
def test_dequantized_weights_are_ours(small_config: OpenELMConfig, export_to: ExportTo, quant: str, tied: bool) -> None:
    checkpoint = wide_checkpoint(small_config, share_input_output_layers=tied)
    folder = export_to(checkpoint, "onnx", quant, weights=WeightOptions(calibrate="none"))
    found = quantized_weights("onnx", folder, checkpoint.config)
    weights = CheckpointWeights(checkpoint, resolve(find_target("onnx").recipe(quant), checkpoint.config))
    quantized = {name: tensor for name, spec in checkpoint.specs.items() if isinstance(tensor := weights.get(spec), IntegerTensor)}
    assert len(quantized) == 4 * checkpoint.config.num_transformer_layers + (1 if tied else 2)
    assert found.keys() == quantized.keys()
    for name, tensor in quantized.items():
        assert np.array_equal(found[name], tensor.dequantize().numpy()), name


@pytest.mark.slow
def test_rows_that_do_not_divide_into_blocks_stay_floats(small_config: OpenELMConfig, export_to: ExportTo) -> None:
    checkpoint = random_checkpoint(replace(small_config, model_dim=176, head_dim=16, ffn_dim_divisor=16))
    folder = export_to(checkpoint, "onnx", "int4")
    fallbacks = json.loads((folder / "manifest.json").read_text())["fallbacks"]
    assert {"transformer.token_embeddings.weight", "transformer.layers.0.attn.qkv_proj.weight"} <= {entry["tensor"] for entry in fallbacks}
    ids = token_ids(20, checkpoint.config)
    assert kl(reference_logits(checkpoint.config, checkpoint.arrays, ids), logits_of(folder, ids)).mean() < 0.5


# The numbers

LIMITS = {
    "fp16": 1e-3,
    "int8": 0.01,
    **dict.fromkeys(QUANTIZED[:-1], 0.5),
    "int4-all": 1.0,
}  # KL in nats; rounding random weights to 4 bits costs what it costs: see the next test


def check_logits(quant: str, checkpoint: MemoryCheckpoint, folder: Path) -> None:
    ids = token_ids(100, checkpoint.config)
    expected = reference_logits(checkpoint.config, checkpoint.arrays, ids)
    found = logits_of(folder, ids)
    assert np.isfinite(found).all()
    if quant == "fp32":
        assert np.abs(log_probs(found) - log_probs(expected)).max() < 2e-3
    else:
        assert kl(expected, found).mean() < LIMITS[quant]


@pytest.mark.parametrize("quant", QUANTS)
def test_logits(exported: Exported, small_checkpoint: MemoryCheckpoint, quant: str) -> None:
    check_logits(quant, small_checkpoint, exported(quant))


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTIZED)
def test_logits_are_those_of_the_quantized_weights(small_config: OpenELMConfig, export_to: ExportTo, quant: str) -> None:
    """What remains is the rounding of activations to 8 bits inside the products."""
    checkpoint = wide_checkpoint(small_config)
    folder = export_to(checkpoint, "onnx", quant)
    ids = token_ids(100, checkpoint.config)
    expected = reference_logits(checkpoint.config, checkpoint.arrays | quantized_weights("onnx", folder, checkpoint.config), ids)
    assert kl(expected, logits_of(folder, ids)).mean() < 0.005


def stored_bits(config: OpenELMConfig, quant: str) -> float:
    """Bits of codes, scales, zero points, norms and floats, by the scheme of each tensor."""
    return resolve(find_target("onnx").recipe(quant), config).bits_per_weight * config.parameter_count


@pytest.mark.slow
@pytest.mark.parametrize("ops", ["fast", "standard"])
@pytest.mark.parametrize("quant", QUANTS)
def test_weights_take_the_space_of_their_codes_and_scales(tiny: Checkpoint, export_to: ExportTo, quant: str, ops: str) -> None:
    folder = export_to(tiny, "onnx", quant, context=64, settings={"ops": ops})
    assert 1 <= next(folder.glob("onnx/*.onnx_data")).stat().st_size * 8 / stored_bits(tiny.config, quant) < 1.02


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int4", "int4-asym", "int8"])
def test_size_of_the_artifact(export_to: ExportTo, quant: str) -> None:
    checkpoint = open_checkpoint("270M", random_weights=1)
    folder = export_to(checkpoint, "onnx", quant, weights=WeightOptions(method="rtn", calibrate="none"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    assert 1 <= size * 8 / stored_bits(checkpoint.config, quant) < 1.02


# Schemes of a user's own recipe


@pytest.mark.parametrize(
    ("name", "role", "message"),
    [
        (
            "int4-block512",
            Role.FFN_DOWN,
            "integers of 4 or 8 bits in blocks of 16, 32, 64, 128, 256",
        ),  # one version of the kernel gave zeros, others refuse
        ("int4-block8", Role.FFN_DOWN, "integers of 4 or 8 bits in blocks of 16, 32, 64, 128, 256"),
        ("int8-block48", Role.FFN_DOWN, "integers of 4 or 8 bits in blocks of 16, 32, 64, 128, 256"),
        ("int8-channel", Role.FFN_DOWN, "integers of 4 or 8 bits in blocks of"),
        ("lut4-group8", Role.FFN_DOWN, "stores fp32, fp16, and integers"),
        ("bf16", Role.FFN_DOWN, "stores fp32, fp16, and integers"),
        ("int4-asym-block32", Role.EMBEDDING, "every matrix but the embedding"),
    ],
)
def test_refused_schemes(name: str, role: Role, message: str) -> None:
    assert message in str(OnnxTarget().refuses(find_scheme(name), role))


@pytest.mark.parametrize("name", ["int4-block16", "int4-block256", "int4-asym-block128", "int8-block64", "fp16", "fp32"])
def test_schemes_that_can_be_stored(name: str) -> None:
    assert OnnxTarget().refuses(find_scheme(name), Role.FFN_DOWN) is None


def test_a_recipe_with_a_block_that_the_engine_lacks(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    text = (files("targets.onnx") / "recipes" / "int4.toml").read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(text.replace("int4-block32", "int4-block48"), encoding="utf-8")
    with pytest.raises(ElmExportError, match="blocks of 16, 32, 64, 128, 256"):
        export_checkpoint(small_checkpoint, "onnx", str(tmp_path / "own.toml"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Options of the model


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"normalize_qk_projections": False},
        {"share_input_output_layers": False},
        {"ffn_with_glu": False},
        {"num_gqa_groups": 1},
        {"rope_freq_constant": 500000},
    ],
    ids=str,
)
@pytest.mark.parametrize("quant", ["fp32", "int8"])
def test_options_of_the_model(small_config: OpenELMConfig, export_to: ExportTo, options: dict[str, Any], quant: str) -> None:
    checkpoint = random_checkpoint(replace(small_config, **options))
    check_logits(quant, checkpoint, export_to(checkpoint, "onnx", quant))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("calibrate", ["auto", "none"])
def test_inflated_residual_stream_in_fp16(small_config: OpenELMConfig, export_to: ExportTo, tied: bool, calibrate: str) -> None:
    """Layers that add hundreds of thousands to the stream, where fp16 ends at 65504: the export rescales them."""
    checkpoint = random_checkpoint(replace(small_config, share_input_output_layers=tied))
    for name, array in checkpoint.arrays.items():
        if name.endswith(("out_proj.weight", "proj_2.weight")):
            array *= 2.0**16
    ids = token_ids(100, checkpoint.config)
    folder = export_to(checkpoint, "onnx", "fp16", weights=WeightOptions(calibrate=calibrate))
    assert json.loads((folder / "manifest.json").read_text())["alpha"] < 1
    assert kl(reference_logits(checkpoint.config, checkpoint.arrays, ids), logits_of(folder, ids)).mean() < 1e-3


def test_context_shorter_than_the_model(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    runtime = open_artifact(export_to(small_checkpoint, "onnx", "fp32", context=7))
    assert runtime.context == 7
    runtime.logits(token_ids(7, small_checkpoint.config))
    with pytest.raises(ElmExportError, match="context of 8; this artifact holds 7"):
        runtime.logits([1], 7)


def test_head_dimension_that_attention_does_not_take(small_config: OpenELMConfig, export_to: ExportTo) -> None:
    checkpoint = random_checkpoint(replace(small_config, head_dim=24, model_dim=192))
    with pytest.raises(ElmExportError, match=r"head_dim is 24; .* multiples of 16"):
        export_to(checkpoint, "onnx", "fp32")


# Plain onnxruntime, in a process that has nothing of ours, with a cache that grows

PLAIN = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
ids = np.load(sys.argv[2])[None]
names = [output.name for output in session.get_outputs()]
pasts = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]
dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
feed = {entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype[entry.type]) for entry in pasts}
feed["logits_to_keep"] = np.array(0)
logits, start = [], 0
for end in (1, 40, 41, ids.shape[1]):
    feed |= {"input_ids": ids[:, start:end], "attention_mask": np.ones((1, end), np.int64)}
    out = dict(zip(names, session.run(names, feed)))
    logits.append(out["logits"][0])
    feed |= {entry.name: out[entry.name.replace("past_key_values", "present")] for entry in pasts}
    start = end
assert not any(name.split(".")[0] in ("elmexport", "targets") for name in sys.modules)
np.save(sys.argv[3], np.concatenate(logits))
"""


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_plain_onnxruntime(exported: Exported, small_checkpoint: MemoryCheckpoint, tmp_path: Path, quant: str) -> None:
    ids = token_ids(60, small_checkpoint.config)
    np.save(tmp_path / "ids.npy", ids)
    folder = tmp_path / "elsewhere"  # the model finds its data wherever the two lie
    shutil.copytree(exported(quant) / "onnx", folder)
    arguments = [str(next(folder.glob("*.onnx"))), str(tmp_path / "ids.npy"), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-I", "-c", PLAIN, *arguments], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "logits.npy")
    assert kl(logits_of(exported(quant), ids), found).mean() < 1e-3
    if quant == "fp32":
        expected = reference_logits(small_checkpoint.config, small_checkpoint.arrays, ids)
        assert np.abs(log_probs(found) - log_probs(expected)).max() < 2e-3


@pytest.mark.parametrize("ops", ["fast", "standard"])
def test_a_factor_that_fp16_scales_cannot_take_goes_on_the_input(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, ops: str
) -> None:
    """Large values times small weights: the residual scale of 2^-5 would take bits from the scales of `attention.out`."""
    arrays = dict(small_checkpoint.arrays)
    for i, layer in enumerate(small_checkpoint.config.layers):
        qkv, out = (f"transformer.layers.{i}.attn.{name}.weight" for name in ("qkv_proj", "out_proj"))
        arrays[qkv] = arrays[qkv].copy()
        arrays[qkv][-layer.kv_heads * small_checkpoint.config.head_dim :] *= 2.0**10
        arrays[out] = arrays[out] * np.float32(2.0**-10)
    recipe = tmp_path / "half.toml"
    recipe.write_text(
        'name = "half"\nwords = "8-bit"\nactivations = "fp16"\nnorms = "fp16"\nscales = "fp16"\nfallback = "fp16"\nmax_self_check_kl = 0.01\n'
        '[[rule]]\nscheme = "int8-block32"\n'
    )
    weights = WeightOptions(method="rtn", calibrate="none")
    checkpoint = MemoryCheckpoint(small_checkpoint.config, arrays, tokenizer_path=small_checkpoint.tokenizer_path)
    artifact = export_to(checkpoint, "onnx", str(recipe), weights=weights, settings={"ops": ops}, verify=True)
    nodes = [node.name for node in onnx.load(model_path(artifact), load_external_data=False).graph.node]
    assert sum(name.endswith("scaled_input") for name in nodes) >= len(small_checkpoint.config.layers)  # of some `ffn.down` too
