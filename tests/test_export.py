"""The export as a whole: what the manifest says, what the self-check catches, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.options import WeightOptions
from calibration.residual import DEFAULT_ALPHA, choose_alpha
from elmexport.artifact import Artifact
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.cli.main import main
from elmexport.errors import ElmExportError, MissingDependencyError, VerificationError
from elmexport.exporting import export, export_checkpoint
from elmexport.manifest import RuleFacts, SelfCheck
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.weight_source import WeightSource
from elmexport.runtimes import open_artifact
from elmexport.weights import Role, WeightSpec
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import kl, reference_logits

TARGETS = ("onnx", "coreml", "gguf", "mlx")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_manifest(target: str, tiny: Checkpoint, tmp_path: Path) -> None:
    result = export_checkpoint(tiny, target, "int4", out=tmp_path / "artifact")
    artifact = Artifact.open(result.path)
    assert artifact.verify() == []
    manifest = artifact.manifest
    assert manifest.model.name == "OpenELM-tiny"
    assert manifest.model.identity == tiny.identity()
    assert OpenELMConfig.from_dict(manifest.model.config) == OpenELMConfig.from_dict(tiny.config.to_dict())
    assert (manifest.target, manifest.context) == (target, tiny.config.max_context_length)
    assert manifest.quant.name == "int4"
    assert manifest.quant.words
    assert manifest.self_check.done
    assert manifest.self_check.tokens == 128
    assert 0 < manifest.self_check.kl_mean < 0.03
    assert manifest.self_check.top1_agreement > 0.85
    # Codes, scales and floats are all that the weights take; the graph itself does not grow with them.
    weights = manifest.bits_per_weight / 8 * tiny.config.parameter_count
    size = sum(facts.bytes for name, facts in manifest.files.items() if not name.startswith(("tokenizer", "golden")))
    assert weights < size < weights + 600_000
    assert str(tmp_path) not in manifest.to_json()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_same_inputs_same_bytes(target: str, tiny: Checkpoint, tmp_path: Path) -> None:
    folders = [export_checkpoint(tiny, target, "int4", out=tmp_path / name).path for name in ("a", "b")]
    contents = [{path.relative_to(f): path.read_bytes() for path in sorted(f.rglob("*")) if path.is_file()} for f in folders]
    assert contents[0] == contents[1]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_broken_artifact_is_discarded(target: str, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix whose codes are shifted by a column, as a packing error would do: the self-check must not let it pass."""
    right = WeightSource.get

    def wrong(self: WeightSource, spec: WeightSpec) -> torch.Tensor | IntegerTensor:
        weight = right(self, spec)
        if spec.role is not Role.FFN_DOWN or not isinstance(weight, IntegerTensor):
            return weight
        return IntegerTensor(weight.scheme, weight.codes.roll(1, dims=1), weight.scales)

    monkeypatch.setattr(WeightSource, "get", wrong)
    with pytest.raises(VerificationError, match=r"self-check failed: KL.* is the most this quantization may cost") as caught:
        export_checkpoint(tiny, target, "int8", out=tmp_path / "artifact")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_without_verification_the_manifest_says_so(tiny: Checkpoint, tmp_path: Path) -> None:
    result = export_checkpoint(tiny, "onnx", "fp32", out=tmp_path / "artifact", verify=False)
    assert result.manifest.self_check == SelfCheck(done=False, reason="not asked for")


def test_a_missing_engine_does_not_cost_the_export(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(kind: str, path: Path, *, check: bool) -> None:
        raise MissingDependencyError("running GGUF files needs llama.cpp; install it with: pip install llama-cpp-python")

    monkeypatch.setattr("elmexport.evaluation.self_check.open_directly", absent)
    result = export_checkpoint(tiny, "gguf", "int8", out=tmp_path / "artifact")
    assert any(note.startswith("self-check not done: running GGUF files needs llama.cpp") for note in result.notes)
    assert result.manifest.self_check.done is False
    assert "pip install llama-cpp-python" in result.manifest.self_check.reason


def test_an_artifact_without_a_tokenizer_says_so(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_checkpoint(model, small_checkpoint.config, {name: torch.from_numpy(array) for name, array in small_checkpoint.arrays.items()})
    result = export(str(model), "onnx", "fp32", out=tmp_path / "artifact", random_weights=0)
    assert any(note.startswith("no tokenizer found") for note in result.notes)
    assert result.manifest.self_check.text == "pseudo-random ids"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_the_tokenizer_is_found_again_whatever_its_file_was_called(
    target: str, tiny: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.tokenizer_path is not None
    renamed = tmp_path / "llama-2.model"
    renamed.write_bytes(tiny.tokenizer_path.read_bytes())
    result = export("tiny", target, "int8", out=tmp_path / "artifact", tokenizer=str(renamed))
    assert (result.path / "tokenizer.model").read_bytes() == renamed.read_bytes()
    with pytest.raises(SystemExit, match="0"):
        main(["generate", str(result.path), "The old captain", "--max-tokens", "3"])
    assert capsys.readouterr().out.strip()


def test_a_model_without_a_tokenizer_is_not_exported_by_accident(
    small_checkpoint: MemoryCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> Path:
        raise MissingDependencyError("access to it is restricted")

    monkeypatch.setattr("elmexport.checkpoint.hub.download_tokenizer", refused)
    monkeypatch.setattr("elmexport.checkpoint.hub.cached_tokenizer", lambda repo: None)
    model, out = tmp_path / "model", tmp_path / "artifact"
    save_checkpoint(model, small_checkpoint.config, {name: torch.from_numpy(array) for name, array in small_checkpoint.arrays.items()})
    with pytest.raises(MissingDependencyError, match=r"model comes without a tokenizer.*or --tokenizer none to go without"):
        export(str(model), "onnx", "int8", out=out)
    assert not out.exists()
    result = export(str(model), "onnx", "int8", out=out, tokenizer="none")
    assert not any("tokenizer" in note for note in result.notes)  # it was asked for


RECIPE = """
name = "{name}"
words = "for a test"
activations = "fp32"
norms = "fp32"
scales = "fp16"
fallback = "fp16"
max_self_check_kl = 1

[[rule]]
roles = ["ffn.down"]
scheme = "{scheme}"

[[rule]]
scheme = "int8-block32"
"""


@pytest.mark.slow
def test_a_recipe_of_the_user_s_own(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.format(name="mine", scheme="int4-block64"))
    result = export_checkpoint(tiny, "onnx", str(path), out=tmp_path / "artifact")
    assert result.manifest.quant.name == "mine"
    assert result.manifest.quant.rule[0] == RuleFacts("int4-block64", roles=("ffn.down",))
    assert 0 < result.manifest.self_check.kl_mean < 0.01
    assert (result.path / "onnx" / "model_mine.onnx").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the recipe .*: No such file"),
        (RECIPE.format(name="a/b", scheme="int8-block32"), "name is 'a/b'; it becomes part of file names"),
        (
            RECIPE.format(name="mine", scheme="int4-block64"),
            r"ffn\.proj_2\.weight \(ffn\.down\) as .* gguf stores fp32, fp16, bf16, int8-block32",
        ),
        (RECIPE.format(name="mine", scheme="int5"), "unknown scheme 'int5'"),
    ],
)
def test_a_recipe_that_cannot_be_used(tiny: Checkpoint, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ElmExportError, match=message):
        export_checkpoint(tiny, "gguf", str(path), out=tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.slow
def test_bits_per_weight(tiny: Checkpoint, tmp_path: Path) -> None:
    """What was chosen lies in the artifact, costs about what was predicted, and gives the same artifact when used as a recipe."""
    result = export_checkpoint(tiny, "onnx", out=tmp_path / "a", weights=WeightOptions(bits_per_weight=6.5))
    manifest = result.manifest
    assert manifest.quant.name == "mixed-6.5"
    assert 6.0 < manifest.bits_per_weight <= 6.5
    cost = manifest.quant.allocation
    assert 0.6 < cost.measured_kl / cost.predicted_kl < 1.6
    again = export_checkpoint(tiny, "onnx", str(result.path / "recipe.toml"), out=tmp_path / "b")
    assert (again.path / "onnx" / "model_mixed-6.5.onnx_data").read_bytes() == (
        result.path / "onnx" / "model_mixed-6.5.onnx_data"
    ).read_bytes()


@pytest.mark.slow
def test_a_context_beyond_the_model_s_own_is_remarked_on(tiny: Checkpoint, tmp_path: Path) -> None:
    result = export_checkpoint(tiny, "onnx", "int8", out=tmp_path / "artifact", context=2 * tiny.config.max_context_length)
    assert any(note.startswith("the model was trained on 256 tokens") for note in result.notes)


def inflated(checkpoint: MemoryCheckpoint, factor: float) -> MemoryCheckpoint:
    """`checkpoint` with everything that writes to its residual stream multiplied, as the published models' streams are large."""
    roles = (Role.ATTENTION_OUT, Role.FFN_DOWN)
    arrays = {name: array * factor if checkpoint.specs[name].role in roles else array for name, array in checkpoint.arrays.items()}
    return MemoryCheckpoint(checkpoint.config, arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "settings"),
    [
        pytest.param("coreml", {}, id="coreml"),
        pytest.param("coreml", {"kv": "io"}, id="coreml-io", marks=pytest.mark.slow),
        pytest.param("coreml", {"device": "gpu"}, id="coreml-gpu"),
        pytest.param("onnx", {}, id="onnx"),
    ],
)
def test_a_large_residual_stream_fits_fp16(
    target: str, settings: Mapping[str, str], small_checkpoint: MemoryCheckpoint, tmp_path: Path
) -> None:
    checkpoint = inflated(small_checkpoint, 2.0**16)
    result = export_checkpoint(checkpoint, target, "fp16", out=tmp_path / "artifact", settings=settings)
    assert result.manifest.calibration.method == "measured"
    assert result.manifest.calibration.residual_peak > 1e5
    assert result.manifest.alpha == choose_alpha(result.manifest.calibration.residual_peak) < 1
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 100)
    expected = reference_logits(checkpoint.config, checkpoint.arrays, ids)
    assert kl(expected, open_artifact(result.path).logits(ids)).mean() < 1e-3


@pytest.mark.slow
def test_without_rescaling_a_large_residual_stream_overflows(
    small_checkpoint: MemoryCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elmexport.exporting.choose_alpha", lambda peak: 1.0)
    with pytest.raises(VerificationError):
        export_checkpoint(inflated(small_checkpoint, 2.0**16), "coreml", "fp16", out=tmp_path / "artifact")


@pytest.mark.slow
def test_alpha_without_calibration(tiny: Checkpoint, tmp_path: Path) -> None:
    result = export_checkpoint(tiny, "coreml", "fp16", out=tmp_path / "artifact", weights=WeightOptions(calibrate="none"))
    assert result.manifest.alpha == DEFAULT_ALPHA
    assert result.manifest.calibration.method == "default"
    assert result.manifest.self_check.kl_mean < 1e-3


Damage = Callable[[Path], None]


def _config(key: str, value: object) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return damage


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "model.pt").open("wb") as file:
        pickle.dump(print, file, protocol=2)  # a reference to code


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


OUT_0, NORM = "transformer.layers.0.attn.out_proj.weight", "transformer.norm.weight"
BAD_INPUT: dict[str, tuple[Damage, str]] = {
    "truncated weights": (_truncate, "model.safetensors is truncated or corrupt"),
    "corrupt header": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64) and None, "is truncated or corrupt"),
    "missing tensor": (_weights(lambda tensors: tensors.pop(NORM)), f"missing tensors: {NORM}"),
    "extra tensor": (_weights(lambda tensors: tensors.update(bias=torch.zeros(3))), "extra tensors: bias"),
    "wrong shape": (
        _weights(lambda tensors: tensors.update({NORM: torch.zeros(7)})),
        f"wrong shapes: {NORM} is [7], config.json calls for",
    ),
    "NaN": (_weights(lambda tensors: tensors[OUT_0][0, 0].fill_(torch.nan)), f"{OUT_0} holds 1 values that are NaN or infinite"),
    "infinity": (_weights(lambda tensors: tensors[OUT_0][1:3, 0].fill_(torch.inf)), f"{OUT_0} holds 2 values that are NaN or infinite"),
    "unknown activation": (_config("activation_fn_name", "gelu"), "activation_fn_name is 'gelu'; elmexport supports swish and silu"),
    "lists against multipliers": (_config("num_kv_heads", [1, 2, 2]), "num_kv_heads[2] is 2, but layer 2 has 3"),
    "another architecture": (_config("model_type", "llama"), "model_type is 'llama'; elmexport exports 'openelm' and 'olmoe' models"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "code in a pickle": (_pickle, "model.pt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_leaves_nothing(
    case: str, verify: bool, small_checkpoint: MemoryCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_INPUT[case]
    model, out = tmp_path / "model", tmp_path / "out" / "artifact"
    save_checkpoint(model, small_checkpoint.config, {name: torch.from_numpy(array) for name, array in small_checkpoint.arrays.items()})
    damage(model)
    arguments = ["onnx", "--model", str(model), "--quant", "int4", "--out", str(out), "--tokenizer", "none"]
    with pytest.raises(SystemExit) as caught:
        main(arguments if verify else [*arguments, "--no-verify"])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_torch_runtime(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    """A checkpoint folder opens like any artifact, and its cache behaves like any runtime's."""
    config = small_checkpoint.config
    save_checkpoint(tmp_path / "model", config, {name: torch.from_numpy(array) for name, array in small_checkpoint.arrays.items()})
    runtime = open_artifact(tmp_path / "model")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, config.max_context_length)
    expected = reference_logits(config, small_checkpoint.arrays, ids)
    for prefill in (1, 64, config.max_context_length - 1):
        parts = [runtime.logits(ids[:prefill])] + [runtime.logits(ids[i : i + 1], i) for i in range(prefill, min(prefill + 3, len(ids)))]
        assert np.abs(np.concatenate(parts) - expected[: prefill + 3]).max() < 1e-3
    assert np.abs(runtime.logits(ids, last=1) - expected[-1:]).max() < 1e-3
    with pytest.raises(ElmExportError, match="need a context of 129; this artifact holds 128: export it with --context 129 or feed fewer"):
        runtime.logits([1], config.max_context_length)
    with pytest.raises(ElmExportError, match="position is 5, but the cache holds 2 tokens"):
        runtime.logits([1, 2])
        runtime.logits([1], 5)
