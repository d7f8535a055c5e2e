"""A FAKE: coremltools' `MLModel` as on a Mac, the suite's only stand-in for Core ML. Packages run in our own executor.

It can show that a caller gives every input by its declared name, type and size, and states where there are any, and makes the right thing of
the outputs. It can show nothing about Core ML itself, which no test runs, and no figure of a model comes from it.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import coremltools
import numpy as np
from numpy.typing import NDArray

from elmexport.mil.executor import MilModel

_DTYPES = {"float16": np.float16, "int32": np.int32}


class FakeMLModel:
    """One function of a package, at its declared sizes."""

    units: ClassVar[set[str]] = set()  # asked for
    noise: ClassVar[float] = 0.0  # added to every output that is a float

    def __init__(self, path: str, function_name: str | None = None, compute_units: Any = coremltools.ComputeUnit.ALL) -> None:
        assert isinstance(compute_units, coremltools.ComputeUnit)
        FakeMLModel.units.add(compute_units.name)
        self.model, self.name = MilModel(Path(path)), function_name
        self.function = self.model.function(function_name)

    def make_state(self) -> dict[str, Any]:
        assert self.function.states
        return self.model.make_states(self.name)

    def predict(self, inputs: dict[str, NDArray[Any]], state: dict[str, Any] | None = None) -> dict[str, NDArray[Any]]:
        assert (state is None) == (not self.function.states)
        assert set(inputs) == set(self.function.inputs)
        for name, kind in self.function.inputs.items():
            assert inputs[name].dtype == _DTYPES[kind.dtype], name
            assert all(want in (None, size) for want, size in zip(kind.shape, inputs[name].shape, strict=True)), name
        results = self.model.predict(inputs, state, self.name)
        generator = np.random.default_rng(0)
        return {
            name: (value + generator.normal(0, self.noise, value.shape)).astype(value.dtype)
            if value.dtype.kind == "f" and self.noise
            else value
            for name, value in results.items()
        }


def fake_coremltools() -> ModuleType:
    """The module, as far as `verify.py` uses it."""
    module = ModuleType("coremltools")
    module.__dict__.update(
        models=SimpleNamespace(MLModel=FakeMLModel),
        utils=SimpleNamespace(load_spec=coremltools.utils.load_spec),
        ComputeUnit=coremltools.ComputeUnit,
    )
    return module
