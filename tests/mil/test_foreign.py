"""Packages that our code did not write: models in plain PyTorch, converted by coremltools, give what PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import coreml_stock
from elmexport.checkpoint.base import Checkpoint
from elmexport.mil.executor import MilModel
from elmexport.runtimes.torch import TorchRuntime
from tests.mil.foreign_models import HIDDEN, AnySize, Encoder, Images, Stateful, StatelessOpenELM
from tests.reference import kl

pytestmark = pytest.mark.slow

PRECISIONS = [(ct.precision.FLOAT32, 2e-6), (ct.precision.FLOAT16, 6e-3)]


def save(source: Any, path: Path, inputs: list[Any] | None, **options: Any) -> MilModel:
    """Convert what `torch.jit.trace` or `torch.export` gave."""
    converted = ct.convert(
        source, inputs=inputs, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True, **options
    )
    converted.save(str(path))
    return MilModel(path)


def seeded(module: nn.Module) -> nn.Module:
    """`module` with running statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(2)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
    return module.eval()


def compare(model: MilModel, module: nn.Module, *inputs: torch.Tensor, tolerance: float, states: Any = None) -> None:
    with torch.no_grad():
        expected = module(*inputs)
    named: Mapping[str, Any] = dict(zip(model.function().inputs, (value.numpy() for value in inputs), strict=True))
    found = model.predict(named, states)
    for ours, theirs in zip(found.values(), expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_an_image_model(precision: Any, tolerance: float, generator: torch.Generator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = seeded(Images())
    x = torch.randn(2, 3, 32, 32, generator=generator)
    inputs = [ct.TensorType("x", x.shape)]
    model = save(torch.jit.trace(module, x), tmp_path / "images.mlpackage", inputs, compute_precision=precision)
    compare(model, module, torch.randn(x.shape, generator=generator), tolerance=tolerance)


def test_images_of_any_size(generator: torch.Generator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = seeded(AnySize())
    size = ct.RangeDim(16, 64, default=32)
    shape = (ct.RangeDim(1, 4, default=1), 3, size, size)
    source = torch.jit.trace(module, torch.randn(1, 3, 32, 32))
    model = save(source, tmp_path / "any.mlpackage", [ct.TensorType("x", shape)], compute_precision=ct.precision.FLOAT32)
    for given in ((1, 3, 32, 32), (3, 3, 48, 48), (2, 3, 17, 17)):
        compare(model, module, torch.randn(given, generator=generator), tolerance=2e-6)


def texts(generator: torch.Generator, *lengths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and masks whose last third is padding."""
    ids = [torch.randint(0, 100, (1, length), dtype=torch.int32, generator=generator) for length in lengths]
    return [(row, (torch.arange(row.shape[1]) < -(-2 * row.shape[1] // 3))[None].to(torch.int32)) for row in ids]


@pytest.mark.slow
def test_an_encoder_for_texts_of_any_length(generator: torch.Generator, tmp_path: Path) -> None:
    """By way of torch.export."""
    torch.manual_seed(0)
    module = Encoder().eval()
    example, *others = texts(generator, 12, 2, 7, 64)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(module, example, dynamic_shapes=({1: length}, {1: length})).run_decompositions({})
    model = save(program, tmp_path / "encoder.mlpackage", None, compute_precision=ct.precision.FLOAT32)
    for ids, mask in (example, *others):
        compare(model, module, ids, mask, tolerance=2e-6)


@pytest.mark.slow
def test_states_and_any_number_of_tokens(generator: torch.Generator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Stateful().eval()
    with torch.no_grad():
        source = torch.jit.trace(module, (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 5)), check_trace=False)
    tokens, end = (ct.RangeDim(1, 64, default=1) for _ in range(2))
    cache = tuple(module.keyCache.shape)
    model = save(
        source,
        tmp_path / "stateful.mlpackage",
        [ct.TensorType("inputIds", (1, tokens), dtype=np.int32), ct.TensorType("causalMask", (1, 1, tokens, end), dtype=np.float16)],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        states=[ct.StateType(ct.TensorType(shape=cache, dtype=np.float16), name) for name in ("keyCache", "valueCache")],
    )
    module.keyCache.zero_()
    module.valueCache.zero_()
    states, past = model.make_states(), 0
    for count in (5, 1, 1, 9):
        ids = torch.randint(0, 100, (1, count), dtype=torch.int32, generator=generator)
        mask = torch.full((count, past + count), HIDDEN).triu(past + 1)[None, None]
        compare(model, module, ids, mask, tolerance=2e-3, states=states)
        past += count


@pytest.fixture(scope="module")
def converted() -> Callable[..., Any]:
    """coremltools' conversion of `tiny`, each function once: it takes longer than all the rest."""
    convert, done = coreml_stock.convert, {}

    def call(config: Any, weights: Any, tokens: int, context: int) -> Any:
        if tokens not in done:
            done[tokens] = convert(config, weights, tokens, context)
        return done[tokens]

    return call


@pytest.mark.slow
@pytest.mark.parametrize(("int4", "limit"), [(False, 1e-3), (True, 0.3)])
def test_the_stock_route_of_tiny(
    tiny: Checkpoint, int4: bool, limit: float, converted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, converted, quantized and merged by coremltools alone; states, two functions."""
    monkeypatch.setattr(coreml_stock, "convert", converted)
    coreml_stock.export_stock(tiny, tmp_path / "stock.mlpackage", prefill=32, int4=int4)
    model = MilModel(tmp_path / "stock.mlpackage")
    ids = np.random.default_rng(0).integers(0, tiny.config.vocab_size, 68).astype(np.int32)
    states, rows = model.make_states("prefill"), []
    for start, stop, function in [(0, 32, "prefill"), (32, 64, "prefill"), *((i, i + 1, "decode") for i in range(64, 68))]:
        inputs = {"input_ids": ids[None, start:stop], "position": np.array([start], np.int32)}
        rows.append(model.predict(inputs, states, function)["logits"][0])
    assert kl(TorchRuntime(tiny).logits(ids), np.concatenate(rows)).mean() < limit


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [(ct.precision.FLOAT32, 1e-5), (ct.precision.FLOAT16, 0.02)])
def test_the_stock_route_of_tiny_without_states(tiny: Checkpoint, precision: Any, tolerance: float, tmp_path: Path) -> None:
    """One function for texts of any length, and the numbers of the reference."""
    module = StatelessOpenELM(tiny.config).eval()
    module.load_state_dict({name: tiny.tensor(name).float() for name in tiny.specs}, assign=True)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, tiny.config.vocab_size, (1, 50)).astype(np.int32))
    with torch.no_grad():
        source = torch.jit.trace(module, ids[:, :12], check_trace=False)
    length = ct.RangeDim(1, 64, default=12)
    model = save(source, tmp_path / "stock.mlpackage", [ct.TensorType("ids", (1, length), dtype=np.int32)], compute_precision=precision)
    for count in (1, 12, 50):
        compare(model, module, ids[:, :count], tolerance=tolerance)
    (found,) = model.predict({"ids": ids.numpy()}).values()
    assert kl(TorchRuntime(tiny).logits(ids[0].numpy()), found[0]).mean() < 1e-3
