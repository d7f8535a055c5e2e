"""What `elmexport coreml` takes: its settings, the contexts and the models of the zoo, and what it says to everything else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from elmexport.contracts.coreml import Interface
from elmexport.errors import ElmExportError
from elmexport.models import find_model, trace
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.recipes import load_recipe
from elmexport.quantization.schemes import Float
from elmexport.quantization.weight_source import Scaled
from elmexport.weights import WeightSpec
from targets.coreml import CoreMLTarget
from targets.coreml.neural_engine.lowering import lower
from targets.coreml.packing import Blob, WeightFile
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint


@pytest.mark.parametrize(
    ("settings", "context", "message"),
    [
        ({"prefill": 256}, 128, r"--prefill is 256 and the context 128 tokens; pass at most --prefill 128, or a larger --context"),
        ({"prefill": 1}, 128, r"--prefill is 1; .* units of 32: pass --prefill 32$"),
        ({"prefill": 0}, 128, r"--prefill is 0; .* pass --prefill 32$"),
        ({"prefill": -64}, 128, r"--prefill is -64; .* pass --prefill 32$"),
        ({"prefill": 100}, 128, r"--prefill is 100; .* pass --prefill 96 or 128$"),
        ({"prefill": 48}, 100, r"context is 100"),
        ({"kv": "ram"}, 128, r"--kv is 'ram'; choose state or io"),
        ({"device": "tpu"}, 128, r"--device is 'tpu'; choose neural-engine or gpu"),
        ({"device": "gpu", "kv": "io"}, 128, r"--kv io has no use with --device gpu"),
        ({"device": "gpu", "argmax": True}, 128, r"--argmax has no use with --device gpu"),
        ({"device": "gpu", "prefill": 64}, 128, r"--prefill has no use with --device gpu"),
    ],
)
def test_bad_settings(
    small_checkpoint: MemoryCheckpoint, export_to: ExportTo, tmp_path: Path, settings: dict[str, Any], context: int, message: str
) -> None:
    with pytest.raises(ElmExportError, match=message):
        export_to(small_checkpoint, "coreml", "int4", context=context, settings=settings, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_too_much_at_once(small_config: OpenELMConfig) -> None:
    config = dataclasses.replace(small_config, rope_max_length=32768)
    CoreMLTarget(prefill=5440).check(config, 16384)  # three queries for each key
    with pytest.raises(ElmExportError, match=r"at most 16384 queries at once: pass --prefill 5440 or less"):
        CoreMLTarget(prefill=5472).check(config, 16384)
    with pytest.raises(ElmExportError, match=r"tokens attend to 16448 others; the Neural Engine takes at most 16384"):
        CoreMLTarget(kv="io").check(config, 16384)


def test_recipes_that_compute_in_fp32(tmp_path: Path) -> None:
    recipe = load_recipe(Path(__file__).parents[3] / "targets" / "onnx" / "recipes" / "fp32.toml")
    with pytest.raises(ElmExportError, match=r'activations is "fp32" in recipe fp32; .* write "fp16"'):
        CoreMLTarget().adapt(recipe)


class _Zeros:
    """Weights of any shape that take no memory."""

    def scheme(self, spec: WeightSpec) -> Float:
        return Float("fp16")

    def get(self, spec: WeightSpec) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float16).expand(spec.shape)

    def scaled(self, spec: WeightSpec, factor: float) -> Scaled:
        return Scaled(self.get(spec))


class _NoFile(WeightFile):
    def _write(self, name: str, array: Any, kind: str | None = None) -> Blob:
        self.blobs[name] = Blob(name, array.shape, array.dtype, 0)
        return self.blobs[name]


def _largest(config: OpenELMConfig, interface: Interface, tokens: int, folder: Path) -> int:
    file = _NoFile(folder, cast(Any, _Zeros()), lambda count: None)
    function = lower(trace(config, config.max_context_length), tokens, file, interface)
    shapes = [output.shape for operation in function.operations for output in operation.outputs]
    assert max(map(len, shapes)) <= 5
    return max(size for shape in shapes for size in shape)


def _config(name: str) -> OpenELMConfig:
    found = find_model(name)
    assert found is not None
    return found.config


@pytest.mark.slow
@pytest.mark.parametrize(("name", "interface"), [("270M", Interface(64)), ("3B", Interface(64, cache_io=True, argmax=True))], ids=str)
def test_no_dimension_of_the_known_models_is_too_large(tmp_path: Path, name: str, interface: Interface) -> None:
    config = _config(name)
    CoreMLTarget(kv="io" if interface.cache_io else "state", argmax=interface.argmax).check(config, config.max_context_length)
    sizes = [_largest(config, interface, tokens, tmp_path / str(tokens)) for tokens in (64, 1)]
    assert sizes == [16000, 16000]  # the halves of the head; gate and up of 3B are two projections of 12288 at most


@pytest.mark.parametrize("name", ["270M", "450M", "1.1B", "3B"])
@pytest.mark.parametrize("context", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("kv", ["state", "io"])
def test_contexts_of_the_known_models(name: str, context: int, kv: str) -> None:
    CoreMLTarget(kv=kv).check(_config(name), context)
