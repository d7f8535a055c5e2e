"""Gain of a method over `mse` on the model at hand, measured by trials on a few matrices.

It predicts what a choice of bits will cost with that method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from calibration.dequantized import Dequantized
from calibration.sensitivity import KLEvaluator, Sensitivity
from elmexport.models.base import ModelConfig
from elmexport.quantization.layers import Between
from elmexport.quantization.recipes import Plan, Recipe, Rule, resolve
from elmexport.quantization.schemes import CodedScheme, Float
from elmexport.quantization.weight_source import WeightSource
from elmexport.weights import Role

FindWeights = Callable[[Plan], WeightSource]
"""Finds the weights under a plan, by the method that is to be judged."""

_LEAST = 0.02  # of a gain: what a trial measures below is noise


@dataclass(frozen=True)
class Gain:
    """Part of the divergence that `mse` leaves which another method leaves."""

    linear: float = 1.0  # of a layer's matrix, or of the head
    table: float = 1.0  # of an embedding in few bits


def measure_gain(
    measured: Sequence[Sensitivity], evaluator: KLEvaluator, config: ModelConfig, base: Recipe, find: FindWeights, plain: FindWeights
) -> Gain:
    """Measure the gain of `find` over `plain` (`mse`): with the matrices of two layers quantized, and with the embedding alone.

    Each has the narrowest scheme among those of `measured`. The layers stand at a quarter and at half of the depth.
    """
    depth = len(config.dims.layers)
    layers = sorted({depth // 4, depth // 2})

    def gain(items: Sequence[Sensitivity]) -> float:
        plan = resolve(_trial(items, base), config)
        before = evaluator.divergence(Dequantized(plain(plan)))
        return max(_LEAST, evaluator.divergence(Dequantized(find(plan))) / before) if before > 0 else 1.0

    linear = [item for item in measured if item.spec.layer in layers]
    table = [item for item in measured if item.spec.role is Role.EMBEDDING and _narrowest(item).is_coarse]
    return Gain(gain(linear) if linear else 1.0, gain(table) if table and config.dims.tied else 1.0)


def _narrowest(item: Sensitivity) -> CodedScheme:
    return min(item.kl, key=lambda scheme: scheme.bits(item.spec.shape))


def _trial(items: Sequence[Sensitivity], base: Recipe) -> Recipe:
    """A recipe for the matrices of `items` that leaves all others as they are."""
    rules = []
    for item in items:
        layer = item.spec.layer
        rules.append(Rule(_narrowest(item), frozenset({item.spec.role}), None if layer is None else Between(layer, layer)))
    exact = Float("fp32")
    return replace(base, name="trial", rules=(*rules, Rule(exact)), norms=exact, fallback=exact)
