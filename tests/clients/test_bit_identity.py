"""One weight set, four formats: the int4 artifacts of a checkpoint hold the same dequantized numbers, bit for bit.

Each file is read by its own format's reader. Core ML's and MLX's weights may be smaller by an exact power of two where the residual stream is
(`alpha` in the manifest).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from calibration.options import WeightOptions
from elmexport.checkpoint.base import Checkpoint
from elmexport.runtimes import open_artifact
from elmexport.weights import Role
from tests.clients.readers import Weights, quantized_weights
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint
from tests.reference import kl

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm")
pytestmark = pytest.mark.slow

TARGETS = ("onnx", "gguf", "coreml", "mlx")
GPU = {"device": "gpu"}  # the form of Core ML packages that has the plain schemes; the Neural Engine's has its own


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Weight sets go into a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELMEXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=["tiny", "small_checkpoint"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Checkpoint)
    return found


@pytest.fixture(scope="module")
def read(checkpoint: Checkpoint, export_to: ExportTo) -> Callable[..., tuple[Weights, dict[str, Any]]]:
    """`read(target, quant, **options)`: quantized weights and manifest of an export, each made once."""
    done: dict[str, tuple[Weights, dict[str, Any]]] = {}

    def call(target: str, quant: str, **options: Any) -> tuple[Weights, dict[str, Any]]:
        key = f"{target} {quant} {options}"
        if key not in done:
            folder: Path = export_to(checkpoint, target, quant, **options)
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            done[key] = quantized_weights(target, folder, checkpoint.config), manifest
        return done[key]

    return call


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


def original(checkpoint: Checkpoint, name: str) -> Any:
    return checkpoint.tensor(name).float().numpy()


@pytest.mark.parametrize("target", TARGETS)
def test_every_matrix_is_quantized_and_close_to_the_original(checkpoint: Checkpoint, read: Callable[..., Any], target: str) -> None:
    weights, _ = read(target, "int4", **({"settings": GPU} if target == "coreml" else {}))
    assert set(weights) == {spec.name for spec in checkpoint.specs.values() if not spec.role.is_norm}
    for name, spec in checkpoint.specs.items():
        if not spec.role.is_norm:
            tensor = original(checkpoint, name)
            error = np.sqrt(np.mean((weights[name] - tensor) ** 2) / np.mean(tensor**2))
            assert error < (0.01 if spec.role is Role.EMBEDDING else 0.1), name


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_gguf_and_onnx(read: Callable[..., Any], quant: str) -> None:
    assert_same(read("gguf", quant)[0], read("onnx", quant)[0])


@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("calibrate", ["auto", "none"])
def test_coreml_and_onnx(checkpoint: Checkpoint, read: Callable[..., Any], calibrate: Literal["auto", "none"], quant: str) -> None:
    options = WeightOptions(calibrate=calibrate)
    expected, _ = read("onnx", quant, weights=options)
    found, manifest = read("coreml", quant, weights=options, settings=GPU)
    assert_same_but_for_alpha(checkpoint, found, expected, manifest)


@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("calibrate", ["auto", "none"])
def test_mlx_and_onnx(checkpoint: Checkpoint, read: Callable[..., Any], calibrate: Literal["auto", "none"], quant: str) -> None:
    """Bit for bit where alpha is 1; else times alpha where the stream is, and scales that fp16 cannot hold are rounded by a bounded part."""
    options = WeightOptions(calibrate=calibrate)
    expected, _ = read("onnx", quant, weights=options)
    found, manifest = read("mlx", quant, weights=options)
    if manifest["alpha"] == 1:
        assert_same(found, expected)
        return
    assert calibrate == "none" and found.keys() == expected.keys()
    for name, weight in found.items():
        times_alpha = checkpoint.specs[name].role in (Role.EMBEDDING, Role.ATTENTION_QKV, Role.FFN_DOWN)
        wanted = expected[name] * np.float32(manifest["alpha"] if times_alpha else 1)
        assert np.abs(weight - wanted).max() <= (0.005 * np.abs(wanted).max() if times_alpha else 0), name


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("onnx", {"ops": "standard"}),
        ("gguf", {"split_max_size": "300K"}),
        ("mlx", {"max_shard_size": "300K"}),
        ("coreml", {}),
        ("coreml", {"kv": "io", "argmax": True}),
        ("coreml", {"max_package_mb": 0.4}),
    ],
    ids=str,
)
def test_every_other_form_has_the_same(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, target: str, settings: dict[str, Any]
) -> None:
    """Standard operators, files and packages that are cut, Core ML packages for the Neural Engine."""
    folders = (export_to(small_checkpoint, "onnx", "int4"), export_to(small_checkpoint, target, "int4", settings=settings))
    expected, found = (
        quantized_weights(name, folder, small_checkpoint.config) for name, folder in zip(("onnx", target), folders, strict=True)
    )
    if any("max_" in name for name in settings):
        assert len([path for path in folders[1].iterdir() if path.suffix in (".gguf", ".safetensors", ".mlpackage")]) > 1
    manifest = json.loads((folders[1] / "manifest.json").read_text(encoding="utf-8"))
    if target == "coreml":
        assert_same_but_for_alpha(small_checkpoint, found, expected, manifest)
    else:
        assert manifest["alpha"] == 1
        assert_same(found, expected)


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_calibrated_weights_are_the_same_in_every_format(checkpoint: Checkpoint, read: Callable[..., Any], method: str) -> None:
    """Computed once, by the first export; with AWQ, the norms that its scales are folded into are the same too."""
    options = WeightOptions(method=method, tokens=2048)
    expected, manifest = read("onnx", "int4", weights=options)
    assert_same(read("gguf", "int4", weights=options)[0], expected)
    of_mlx, about_mlx = read("mlx", "int4", weights=options)
    assert about_mlx["alpha"] == 1
    assert_same(of_mlx, expected)
    found, of_coreml = read("coreml", "int4", weights=options, settings=GPU)
    assert_same_but_for_alpha(checkpoint, found, expected, of_coreml)
    plain, _ = read("onnx", "int4")
    assert not any(np.array_equal(expected[name], plain[name]) for name in expected if checkpoint.specs[name].role is not Role.EMBEDDING)
    assert manifest["quant"]["method"] == of_coreml["quant"]["method"] == method
    assert manifest["quant"]["calibration"] == of_coreml["quant"]["calibration"]


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_formats_compute_the_same_function(checkpoint: Checkpoint, export_to: ExportTo, method: str) -> None:
    """Norms included, which are stored in float in every format."""
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, 64)
    options = WeightOptions(method=method, tokens=2048)
    folders = [export_to(checkpoint, target, "int4", weights=options, settings=GPU if target == "coreml" else {}) for target in TARGETS]
    logits = [open_artifact(folder).logits(ids) for folder in folders]
    for other in logits[1:]:
        assert kl(logits[0], other).mean() < 5e-3  # onnxruntime multiplies in int8, Core ML rounds to fp16


def assert_same_but_for_alpha(checkpoint: Checkpoint, found: Weights, expected: Weights, manifest: dict[str, Any]) -> None:
    calibrate = manifest["calibration"]["method"]
    alpha = manifest["alpha"]
    assert np.log2(alpha).is_integer() and (alpha < 1 or calibrate == "measured")
    unscaled, scaled = {}, 0
    for name, weight in found.items():
        into_stream = checkpoint.specs[name].role in (Role.ATTENTION_OUT, Role.FFN_DOWN)
        # Where fp16 scales cannot take alpha without rounding, the graph multiplies instead, and the weight stays as it is.
        factor = alpha if into_stream and not np.array_equal(weight, expected[name]) else 1.0
        unscaled[name] = weight / np.float32(factor)
        scaled += factor != 1
    assert alpha == 1 or scaled > 0 or manifest["quant"]["name"] == "int8"  # whose scales are so small that none may take 1/32
    assert_same(unscaled, expected)


def test_coreml_int8_is_per_channel_and_close(checkpoint: Checkpoint, read: Callable[..., Any]) -> None:
    weights, _ = read("coreml", "int8")
    for name, weight in weights.items():
        tensor = original(checkpoint, name)
        assert np.sqrt(np.mean((weight - tensor) ** 2) / np.mean(tensor**2)) < 0.02, name
