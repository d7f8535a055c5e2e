"""The most likely token of a head in parts: the one that numpy finds in all of them, the first where several are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from elmexport.mil.executor import MilModel
from targets.coreml.neural_engine.head import logits, most_likely
from tests.mil.packages import function, write_package

SIZES = ((7,), (4, 3), (1, 5, 2))


def model(tmp_path: Path, sizes: tuple[int, ...], end: object) -> MilModel:
    specs = {f"part{i}": mb.TensorSpec((1, size, 1, 1), dtype=types.fp16) for i, size in enumerate(sizes)}
    build = end  # of the parts, which come by keyword
    made = function(specs, lambda **parts: build(list(parts.values())))  # type: ignore[operator]
    return MilModel(write_package(tmp_path / "model.mlpackage", {"main": made}))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_most_likely(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    head, generator = model(tmp_path, sizes, most_likely), np.random.default_rng(0)
    bounds = np.cumsum((0, *sizes))
    seen = set()
    for _ in range(100):
        scores = generator.integers(-3, 3, sum(sizes)).astype(np.float32)  # so few values that the largest is often there twice
        inputs = {f"part{i}": torch.from_numpy(scores[bounds[i] : bounds[i + 1]].reshape(1, -1, 1, 1)) for i in range(len(sizes))}
        found = head.run(inputs)
        assert found["token"].shape == found["value"].shape == (1, 1)
        assert (int(found["token"]), float(found["value"])) == (scores.argmax(), scores.max())
        seen.add(int(found["token"]))
    assert seen == set(range(sum(sizes)))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logits(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    head = model(tmp_path, sizes, logits)
    names = ["logits"] if len(sizes) == 1 else [f"logits_{i}" for i in range(len(sizes))]
    found = head.run({f"part{i}": torch.full((1, size, 1, 1), float(i)) for i, size in enumerate(sizes)})
    assert list(found) == names
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        assert found[name].tolist() == [[[float(i)] * size]]
