"""Gain of a method, by trials on a few matrices."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from calibration.gains import measure_gain
from calibration.sensitivity import KLEvaluator, Sensitivity
from calibration.text import Sample
from elmexport.quantization.codec import Quantized
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme, Float, find_scheme
from elmexport.quantization.weight_source import CheckpointWeights, WeightSource
from elmexport.target import find_target
from elmexport.weights import WeightSpec
from tests.memory_checkpoint import MemoryCheckpoint


class Shrunk(WeightSource):
    """Values that lie between the model's own and the quantized ones: their error is the quantized ones' times `part`."""

    def __init__(self, checkpoint: MemoryCheckpoint, plan: Plan, part: float) -> None:
        super().__init__(checkpoint, plan)
        self.part, self.seen = part, [name for name, scheme in plan.schemes.items() if isinstance(scheme, CodedScheme)]

    def get(self, spec: WeightSpec) -> Tensor | Quantized:
        scheme, own = self.scheme(spec), self._checkpoint.tensor(spec.name)
        if isinstance(scheme, Float):
            return own
        assert isinstance(scheme, CodedScheme)
        return own + self.part * (quantize(own, scheme).dequantize() - own)

    def _quantized(self, spec: WeightSpec, scheme: CodedScheme) -> Quantized:
        raise NotImplementedError


@pytest.mark.slow
def test_half_the_error_is_a_quarter_of_the_divergence(small_checkpoint: MemoryCheckpoint) -> None:
    ids = np.random.default_rng(0).integers(0, small_checkpoint.config.vocab_size, (4, 32))
    evaluator = KLEvaluator(small_checkpoint, Sample(ids, "random ids"))
    kinds = [scheme for name in ("int8-block32", "int6-block32") if isinstance(scheme := find_scheme(name), CodedScheme)]
    items = [Sensitivity(spec, dict.fromkeys(kinds, 1.0)) for spec in small_checkpoint.specs.values() if not spec.role.is_norm]
    trials: list[list[str]] = []

    def half(plan: Plan) -> WeightSource:
        found = Shrunk(small_checkpoint, plan, 0.5)
        trials.append(found.seen)
        return found

    base = find_target("mlx").recipe("int4")
    gain = measure_gain(
        items, evaluator, small_checkpoint.config, base, half, lambda plan: CheckpointWeights(small_checkpoint, plan, "mse")
    )
    assert gain.linear == pytest.approx(0.25, rel=0.15)
    assert gain.table == pytest.approx(0.25, rel=0.15)
    assert {name.split(".")[2] for name in trials[0]} == {"0", "1"}  # of three layers
    assert trials[1] == ["transformer.token_embeddings.weight"]
