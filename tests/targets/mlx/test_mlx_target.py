"""The MLX artifact: what lies in the folder, as safetensors and mlx read it; alpha; what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.options import WeightOptions
from elmexport.artifact import Artifact
from elmexport.errors import ElmExportError
from elmexport.exporting import export_checkpoint
from elmexport.inspection import inspect_artifact
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import resolve
from elmexport.quantization.schemes import CodedScheme, Float
from elmexport.runtimes import open_artifact
from elmexport.runtimes.mlx import open_runtime
from elmexport.target import find_target
from elmexport.weights import Role
from targets.mlx import MlxTarget
from tests.conftest import ExportTo, SmallArtifact
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.reference import kl, log_probs, reference_logits
from tests.targets.mlx.mlx_files import config, stored, weights

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(small_artifact: SmallArtifact) -> Exported:
    """`exported(quant)`: the artifact of the small checkpoint, made once."""
    return partial(small_artifact, "mlx")


@pytest.mark.slow
@pytest.mark.parametrize("quant", MlxTarget.quants)
def test_every_tensor_holds_the_numbers_of_its_scheme(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, quant: str) -> None:
    """Dequantized by mlx: the codec's own numbers, bit for bit; biases of asymmetric ones are rounded to fp16."""
    folder = export_to(small_checkpoint, "mlx", quant, weights=WeightOptions(method="rtn"))
    plan = resolve(find_target("mlx").recipe(quant), small_checkpoint.config)
    found = weights(folder)
    assert found.keys() == small_checkpoint.specs.keys()
    for name, scheme in plan.schemes.items():
        source = torch.from_numpy(small_checkpoint.arrays[name])
        if isinstance(scheme, Float):
            assert np.array_equal(found[name], source.to(DTYPES[scheme.dtype]).float().numpy()), name
        else:
            assert isinstance(scheme, CodedScheme)
            expected = quantize(source, scheme, "rtn").dequantize().numpy()
            bound = 15 * 2**-11 * np.abs(expected).max() if "asym" in scheme.recipe_name else 0
            assert np.abs(found[name] - expected).max() <= bound, name


@pytest.mark.slow
@pytest.mark.parametrize("quant", MlxTarget.quants)
def test_bits_per_weight_are_those_of_the_file(exported: Exported, small_config: OpenELMConfig, quant: str) -> None:
    folder = exported(quant)
    widths = {"U32": 4, "U8": 1, "F16": 2, "BF16": 2}
    size = sum(widths[dtype] * math.prod(shape) for dtype, shape in stored(folder).values())
    manifest = Artifact.open(folder).manifest
    assert manifest.bits_per_weight == pytest.approx(8 * size / small_config.parameter_count, abs=1e-4)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": size, "total_parameters": small_config.parameter_count}
    assert index["weight_map"] == dict.fromkeys(sorted(stored(folder)), "model.safetensors")


def test_config(exported: Exported, small_config: OpenELMConfig) -> None:
    found = config(exported("int4"))
    assert {key: found[key] for key in small_config.to_dict()} == small_config.to_dict()
    assert found["quantization"] == found["quantization_config"]
    assert found["quantization"] == {
        **{"group_size": 32, "bits": 4, "mode": "affine"},
        "transformer.token_embeddings": {"group_size": 32, "bits": 8, "mode": "affine"},
    }
    assert (found["rms_norm_eps"], found["torch_dtype"]) == (1e-6, "float16")
    assert "quantization" not in config(exported("bf16")) and config(exported("bf16"))["torch_dtype"] == "bfloat16"
    assert config(exported("mxfp4"))["quantization"]["mode"] == "mxfp4"


@pytest.mark.slow
def test_a_recipe_of_ones_own_mixes_modules(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    rules = {"ffn.down": "mxfp4", "attention.out": "fp16", "attention.qkv": "int6-block64", "embedding": "int5-block32"}
    head = 'name = "mine"\nwords = "w"\nactivations = "fp16"\nnorms = "fp16"\nscales = "fp16"\nfallback = "fp16"\nmax_self_check_kl = 1\n'
    text = "".join(f'[[rule]]\nroles = ["{role}"]\nscheme = "{scheme}"\n' for role, scheme in rules.items())
    path.write_text(head + text + '[[rule]]\nscheme = "int3-block64"\n', encoding="utf-8")
    folder = export_to(small_checkpoint, "mlx", str(path), verify=True)
    quantization = config(folder)["quantization"]
    layer = "transformer.layers.2"
    assert (quantization["bits"], quantization["group_size"]) == (3, 64)
    assert quantization[f"{layer}.ffn.proj_2"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert quantization[f"{layer}.attn.out_proj"] is False
    assert quantization[f"{layer}.attn.qkv_proj"] == {"group_size": 64, "bits": 6, "mode": "affine"}
    assert quantization["transformer.token_embeddings"]["bits"] == 5
    assert weights(folder).keys() == small_checkpoint.specs.keys()
    listing = inspect_artifact(folder, tensors=True).tensors
    assert listing is not None
    schemes = {tensor.role: tensor.scheme for tensor in listing}
    assert schemes[Role.FFN_DOWN] == "mxfp4 4-bit, groups of 32" and schemes[Role.ATTENTION_OUT] == "float16"
    assert {(tensor.name, tensor.shape) for tensor in listing} == {(spec.name, spec.shape) for spec in small_checkpoint.specs.values()}


@pytest.mark.slow
def test_bits_per_weight_mixes_integers_between_4_and_8(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    """The size that was asked for is the file's, biases included; `recipe.toml` gives the same artifact again."""
    options = WeightOptions(bits_per_weight=6.2)
    path = export_checkpoint(small_checkpoint, "mlx", out=tmp_path / "mixed", weights=options).path
    widths = {"U32": 4, "F16": 2}
    size = 8 * sum(widths[dtype] * math.prod(shape) for dtype, shape in stored(path).values()) / small_checkpoint.config.parameter_count
    assert 6.0 < size <= 6.2 and Artifact.open(path).manifest.bits_per_weight == pytest.approx(size, abs=1e-4)
    quantization = config(path)["quantization"]
    bits = {quantization["bits"], *(facts["bits"] for facts in quantization.values() if isinstance(facts, dict))}
    assert bits & {3, 5, 6}
    again = export_checkpoint(small_checkpoint, "mlx", str(path / "recipe.toml"), out=tmp_path / "again", verify=False).path
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["100K", "1", "1G"])
def test_shards(small_checkpoint: MemoryCheckpoint, export_to: ExportTo, exported: Exported, size: str) -> None:
    folder = export_to(small_checkpoint, "mlx", "int4", settings={"max_shard_size": size})
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert files == ["model.safetensors"] if size == "1G" else files[0] == f"model-00001-of-{count:05d}.safetensors" and count > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == set(files)
    found, expected = weights(folder), weights(exported("int4"))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    modules = {name.rpartition(".")[0] for name in index["weight_map"]}
    assert all(len({file for name, file in index["weight_map"].items() if name.rpartition(".")[0] == module}) == 1 for module in modules)


@pytest.mark.parametrize("size", ["", "0", "5GB", "-1", "1.5G"])
def test_bad_shard_sizes(small_checkpoint: MemoryCheckpoint, size: str) -> None:
    with pytest.raises(ElmExportError, match=r"--max-shard-size is .*; give bytes, or thousands of them"):
        find_target("mlx", {"max_shard_size": size}).check(small_checkpoint.config, 16)


def test_card_and_generation_config(exported: Exported) -> None:
    folder = exported("int4")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: mlx\npipeline_tag: text-generation\ntags:\n- elmexport\n- mlx\n- int4\n---\n")
    assert "base_model" not in card and "mlx_lm.generate" in card
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False}


# alpha: the whole stream times a power of two, where MLX has only one eps and no factors between ops.


def inflated(config: OpenELMConfig, factor: float, seed: int = 0) -> MemoryCheckpoint:
    """A checkpoint whose residual stream is `factor` times as large as another's, its logits being the same."""
    checkpoint = random_checkpoint(config, seed)
    for spec in checkpoint.specs.values():
        if spec.role.writes_to_stream:
            checkpoint.arrays[spec.name] *= np.float32(factor)
        if spec.role is Role.NORM_FINAL and config.share_input_output_layers:
            checkpoint.arrays[spec.name] /= np.float32(factor)
    return checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_qk_projections": False}, {"share_input_output_layers": False}],
    ids=["qk-norm", "no-qk-norm", "untied"],
)
@pytest.mark.parametrize("quant", ["fp16", "int8", "int4"])
def test_alpha_changes_nothing(small_config: OpenELMConfig, tmp_path: Path, options: dict[str, bool], quant: str) -> None:
    """Against the same export with a stream that needs none."""
    settings = replace(small_config, **options)  # type: ignore[arg-type]
    ids = np.random.default_rng(0).integers(0, settings.vocab_size, 64)
    large, small = inflated(settings, 2.0**17), inflated(settings, 4.0)
    rtn = WeightOptions(method="rtn")
    results = {}
    for checkpoint, name in ((large, "large"), (small, "small")):
        result = export_checkpoint(checkpoint, "mlx", quant, out=tmp_path / name, verify=False, weights=rtn)
        results[name] = result, open_artifact(result.path).logits(ids)
    manifest = results["large"][0].manifest
    assert manifest.alpha < 2**-5 and results["small"][0].manifest.alpha == 1
    assert config(tmp_path / "large")["rms_norm_eps"] == 1e-6 * manifest.alpha**2
    assert kl(results["small"][1], results["large"][1]).max() < 1e-4
    expected = reference_logits(settings, large.arrays, ids)
    assert kl(expected, results["large"][1]).mean() < {"fp16": 1e-5, "int8": 2e-3, "int4": 0.4}[quant]


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "int4", "mxfp4"])
def test_scales_below_the_normal_range_of_fp16(
    small_checkpoint: MemoryCheckpoint, exported: Exported, export_to: ExportTo, quant: str
) -> None:
    """The alpha that is taken where nothing is measured, on weights as small as a model's: scales are rounded, by a bounded part."""
    rtn = {"weights": WeightOptions(method="rtn", calibrate="none")}
    folder = export_to(small_checkpoint, "mlx", quant, **rtn)
    manifest = Artifact.open(folder).manifest
    assert manifest.alpha == 2**-5
    found, plan = weights(folder), resolve(find_target("mlx").recipe(quant), small_checkpoint.config)
    for name, spec in small_checkpoint.specs.items():
        scheme = plan.schemes[name]
        factor = 2**-5 if spec.role in (Role.EMBEDDING, Role.ATTENTION_QKV, Role.FFN_DOWN) else 1
        if isinstance(scheme, CodedScheme):
            expected = quantize(torch.from_numpy(small_checkpoint.arrays[name]), scheme, "rtn").dequantize().numpy() * np.float32(factor)
            assert np.abs(found[name] - expected).max() <= 0.005 * np.abs(expected).max(), name
            assert factor != 1 or np.array_equal(found[name], expected), name
    ids = np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, 64)
    plain = export_to(small_checkpoint, "mlx", quant, weights=WeightOptions(method="rtn"))
    assert Artifact.open(plain).manifest.alpha == 1
    assert kl(open_artifact(plain).logits(ids), open_artifact(folder).logits(ids)).mean() < 1e-4


def test_norms_of_small_queries_keep_their_eps(small_config: OpenELMConfig, tmp_path: Path) -> None:
    """Queries and keys so small that eps decides what their norms give. One eps for all norms, times alpha², would be another function."""
    checkpoint = inflated(small_config, 2.0**17)
    for name, spec in checkpoint.specs.items():
        if spec.role is Role.ATTENTION_QKV:
            layer = small_config.layers[spec.layer or 0]
            checkpoint.arrays[name][: (layer.query_heads + layer.kv_heads) * small_config.head_dim] *= np.float32(1e-3)
    ids = np.random.default_rng(0).integers(0, small_config.vocab_size, 64)
    expected = reference_logits(small_config, checkpoint.arrays, ids)
    result = export_checkpoint(checkpoint, "mlx", "fp16", out=tmp_path / "artifact", verify=False)
    assert result.manifest.alpha < 2**-5
    assert kl(expected, open_artifact(result.path).logits(ids)).max() < 5e-3  # numbers as small as these are rounded by fp16
    data = config(result.path)
    data["rms_norm_eps"] = 1e-6  # what mlx-swift takes, whatever stands there
    (result.path / "config.json").write_text(json.dumps(data), encoding="utf-8")
    assert kl(expected, open_runtime(result.path).logits(ids)).mean() > 0.1


def test_a_tied_head_beyond_fp16_gets_a_table_of_its_own(small_config: OpenELMConfig, tmp_path: Path) -> None:
    checkpoint = inflated(small_config, 2.0**15)
    table, norm = checkpoint.arrays["transformer.token_embeddings.weight"], checkpoint.arrays["transformer.norm.weight"]
    table[:, 7] *= norm[7] / np.float32(400)
    norm[7] = 400
    result = export_checkpoint(checkpoint, "mlx", "fp16", out=tmp_path / "artifact", verify=False)
    assert any("the head has a table of its own" in note for note in result.notes)
    assert config(result.path)["share_input_output_layers"] is False
    found = weights(result.path)
    assert np.array_equal(found["lm_head.weight"], table.astype(np.float16).astype(np.float32))
    ids = np.random.default_rng(0).integers(0, small_config.vocab_size, 64)
    expected = reference_logits(small_config, checkpoint.arrays, ids)
    assert kl(expected, open_artifact(result.path).logits(ids)).mean() < 1e-3
    listing = inspect_artifact(result.path, tensors=True).tensors
    assert listing is not None and any(tensor.role is Role.LM_HEAD for tensor in listing)


# What MLX, or mlx-lm's class, cannot hold.


def test_no_gate(small_config: OpenELMConfig) -> None:
    with pytest.raises(
        ElmExportError, match=r"mlx-lm's openelm class cannot express this model: ffn_with_glu is false .* Export it to onnx"
    ):
        find_target("mlx").check(replace(small_config, ffn_with_glu=False), 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": "fp32"}, "activations are fp32, but norms has fp16; MLX computes in the type of what is stored"),
        ({"activations": "bf16"}, "activations are bf16, but norms has fp16; MLX computes"),
        ({"norms": "fp32"}, "activations are fp16, but norms has fp32"),
        ({"scheme": "bf16"}, "but scheme bf16 has bf16"),
    ],
)
def test_recipes_of_mixed_types(tmp_path: Path, small_checkpoint: MemoryCheckpoint, changes: dict[str, str], message: str) -> None:
    facts = {"activations": "fp16", "norms": "fp16", "scheme": "int4-block32"} | changes
    path = tmp_path / "mine.toml"
    path.write_text(
        f'name = "mine"\nwords = "w"\nactivations = "{facts["activations"]}"\nnorms = "{facts["norms"]}"\nscales = "fp16"\nfallback = "fp16"\n'
        f'max_self_check_kl = 1\n[[rule]]\nscheme = "{facts["scheme"]}"\n',
        encoding="utf-8",
    )
    with pytest.raises(ElmExportError, match=message):
        export_checkpoint(small_checkpoint, "mlx", str(path), out=tmp_path / "artifact")


@pytest.mark.parametrize("scheme", ["fp32", "int4-block16", "int4-channel", "lut4-tensor", "ggml-q4_0", "mxfp4"])
def test_refused_schemes(scheme: str) -> None:
    from elmexport.quantization.schemes import find_scheme

    target = find_target("mlx")
    reason = target.refuses(find_scheme(scheme), Role.EMBEDDING)
    assert reason is not None and reason.startswith("stores ")
    assert (target.refuses(find_scheme(scheme), Role.FFN_DOWN) is None) == (scheme == "mxfp4")


def test_weights_at_the_end_of_fp16(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(small_checkpoint.config, small_checkpoint.arrays)
    name = "transformer.layers.0.ffn.proj_1.weight"
    checkpoint.arrays[name] = checkpoint.arrays[name].copy()
    checkpoint.arrays[name][0, 0] = 65400
    with pytest.raises(ElmExportError, match="where MLX's biases leave it; export with --quant bf16"):
        export_checkpoint(checkpoint, "mlx", "int8", out=tmp_path / "artifact", verify=False)
    assert not (tmp_path / "artifact").exists()


@pytest.mark.slow
def test_logits_of_every_quantization(small_checkpoint: MemoryCheckpoint, exported: Exported) -> None:
    """The runtime computes with the stored numbers in fp32: the float64 reference on the dequantized ones agrees."""
    ids = np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, 40)
    for quant in MlxTarget.quants:
        expected = reference_logits(small_checkpoint.config, weights(exported(quant)), ids)
        assert np.abs(log_probs(open_artifact(exported(quant)).logits(ids)) - log_probs(expected)).max() < 2e-4, quant
