"""Bit allocation: the mix of schemes, matrix by matrix, of least predicted divergence at a given size.

Every matrix takes one of several schemes, and their divergences add up (`calibration.sensitivity`): a multiple-choice knapsack. It is solved
exactly, but for rounding: the embedding may be a fifth of the model, too large a piece for a greedy choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from math import ceil

import numpy as np

from calibration.collect import collect
from calibration.costs import known_sensitivities
from calibration.gains import FindWeights, Gain, measure_gain
from calibration.sensitivity import KLEvaluator, Sensitivity
from calibration.statistics import mean_square_of
from calibration.text import bundled_sample
from elmexport.checkpoint import open_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.progress import Progress
from elmexport.quantization.layers import Between
from elmexport.quantization.recipes import Plan, Recipe, Rule, resolve
from elmexport.quantization.schemes import CodedScheme, find_scheme
from elmexport.quantization.weight_source import CheckpointWeights, WeightSource
from elmexport.target import Target
from elmexport.weights import Role, WeightSpec

# A target takes those that it can express: tables are Core ML's, integers of 3, 5 and 6 bits MLX's, and GGUF has 5-bit ones and types of its own.
CANDIDATES = (
    *("int3-block64", "int3-block32", "int4-block128", "int4-block64", "int4-block32", "int5-block64", "int5-block32"),
    *("int6-block64", "int6-block32", "lut6-group64", "lut6-group16", "int8-block32"),
    *("gguf-q3_k", "gguf-iq4_xs", "gguf-iq4_nl", "gguf-q4_k", "gguf-q5_k", "gguf-q6_k"),
)

_GRAINS = 20000
TOKENS, WINDOW = 1024, 256  # of the text that costs are measured on


@dataclass(frozen=True)
class Allocation:
    """Chosen recipe, and its predicted cost."""

    recipe: Recipe
    bits_per_weight: float
    predicted_kl: float  # nats per token


@dataclass(frozen=True)
class Costs:
    """Costs of each matrix of a model in each scheme that it may have."""

    measured: Sequence[Sensitivity]
    text: str  # that they were measured on, in words
    config: ModelConfig
    base: Recipe  # of which an allocation takes everything but the rules

    def allocate(self, bits_per_weight: float) -> Allocation:
        """See `allocate`."""
        return allocate(self.measured, self.config, self.base, bits_per_weight)

    def sizes(self) -> tuple[float, float]:
        """Count bits per weight with the narrowest and with the widest scheme everywhere."""
        offered, specs = {item.spec.name: tuple(item.kl) for item in self.measured}, list(self.config.weights())
        return _extreme_bits(specs, offered, self.base, min), _extreme_bits(specs, offered, self.base, max)


def choose_bits(
    checkpoint: Checkpoint, target: Target, base: Recipe, bits_per_weight: float, find: FindWeights | None, progress: Progress
) -> tuple[Allocation, str]:
    """Allocate bits to `checkpoint`; returns which text chose, too. See `measure_costs` for `find`.

    Raises:
        ElmExportError: see `allocate`.
    """
    specs = list(checkpoint.specs.values())
    check_budget(specs, candidates(target, specs), base, bits_per_weight)  # before the minutes that measuring takes
    costs = measure_costs(checkpoint, target, base, find, progress)
    return costs.allocate(bits_per_weight), costs.text


def measure_costs(checkpoint: Checkpoint, target: Target, base: Recipe, find: FindWeights | None, progress: Progress) -> Costs:
    """Measure what `allocate` needs, for the schemes that `target` can hold, on the bundled text for choices.

    Costs are measured with scales of least weighted error. `find` is the method which will find the codes, if it is another one: trials on
    a few matrices say what it gains.
    """
    window = min(WINDOW, checkpoint.config.dims.context)
    tokenizer, config = open_tokenizer(checkpoint), checkpoint.config
    sample = bundled_sample(tokenizer, config, "choice", tokens=TOKENS, window=window)
    weighting = bundled_sample(tokenizer, config, "weighting", tokens=TOKENS, window=window)
    specs = list(checkpoint.specs.values())
    evaluator = KLEvaluator(checkpoint, sample)
    weigh = cache(lambda: collect(checkpoint, weighting, progress=progress))
    measured = known_sensitivities(checkpoint, candidates(target, specs), weighting, weigh, sample, evaluator, progress)
    if find is not None:

        def plain(plan: Plan) -> WeightSource:
            return CheckpointWeights(checkpoint, plan, "mse", mean_square_of(weigh().moments))

        gain = measure_gain(measured, evaluator, config, base, find, plain)
        measured = [with_gain(item, gain) for item in measured]
    return Costs(measured, sample.words, config, base)


def mixed_name(bits_per_weight: float) -> str:
    """Name the recipe that `allocate` makes."""
    return f"mixed-{bits_per_weight:g}"


def drop_name(max_drop: float) -> str:
    """Name the recipe that `--max-drop` finds."""
    return f"drop-{max_drop:g}"


def candidates(target: Target, specs: Iterable[WeightSpec]) -> dict[str, tuple[CodedScheme, ...]]:
    """List the schemes among `CANDIDATES` that each matrix's shape and `target` can take, by its name. Others are left out."""
    known = [scheme for name in CANDIDATES if isinstance(scheme := find_scheme(name), CodedScheme)]
    found = {
        spec.name: tuple(s for s in known if s.refuses(spec.shape) is None and target.refuses(s, spec.role) is None)
        for spec in specs
        if not spec.role.is_norm
    }
    return {name: schemes for name, schemes in found.items() if schemes}


def check_budget(specs: Sequence[WeightSpec], offered: Mapping[str, Sequence[CodedScheme]], base: Recipe, bits_per_weight: float) -> None:
    """Refuse a size that not even the narrowest schemes reach.

    Raises:
        ElmExportError: `bits_per_weight` is too small.
    """
    least = _extreme_bits(specs, offered, base, min)
    if bits_per_weight < least:
        raise ElmExportError(
            f"--bits-per-weight {bits_per_weight:g} is less than the narrowest that this format offers for this model; ask for {least + 0.005:.2f} or more"
        )


def allocate(measured: Sequence[Sensitivity], config: ModelConfig, base: Recipe, bits_per_weight: float) -> Allocation:
    """Find the recipe of least predicted divergence within `bits_per_weight`, counted as in manifests (all parameters, with scales).

    Everything but the rules is that of `base`.

    Raises:
        ElmExportError: see `check_budget`.
    """
    specs = list(config.weights())
    scale_bits = base.scale_bits
    check_budget(specs, {item.spec.name: tuple(item.kl) for item in measured}, base, bits_per_weight)
    names = {item.spec.name for item in measured}
    fixed = sum(_bits(spec, {}, base, scale_bits) for spec in specs if spec.name not in names)
    chosen = _cheapest(measured, int(bits_per_weight * sum(spec.size for spec in specs)) - fixed, scale_bits)
    rules = _rules(chosen, {spec.name: spec for spec in specs})
    recipe = replace(base, name=mixed_name(bits_per_weight), words=_words(chosen), rules=rules)
    plan = resolve(recipe, config)
    assert all(plan.schemes[name] == scheme for name, scheme in chosen.items())
    return Allocation(recipe, plan.bits_per_weight, sum(item.kl[chosen[item.spec.name]] for item in measured))


def with_gain(item: Sensitivity, gain: Gain) -> Sensitivity:
    """Predict `item` under a method of `gain`."""
    if item.spec.role is Role.EMBEDDING:
        return replace(item, kl={scheme: kl * (gain.table if scheme.is_coarse else 1.0) for scheme, kl in item.kl.items()})
    return replace(item, kl={scheme: kl * gain.linear for scheme, kl in item.kl.items()})


def _cheapest(measured: Sequence[Sensitivity], budget: int, scale_bits: int) -> dict[str, CodedScheme]:
    """Solve a multiple-choice knapsack by dynamic programming: the scheme of each matrix, of least total divergence within `budget` bits.

    Bits beyond those of the narrowest schemes are counted in `_GRAINS` grains of what is left of the budget, rounded up.
    """
    options = [sorted(item.kl, key=lambda scheme: scheme.bits(item.spec.shape, scale_bits)) for item in measured]
    extra = [
        [scheme.bits(item.spec.shape, scale_bits) - schemes[0].bits(item.spec.shape, scale_bits) for scheme in schemes]
        for item, schemes in zip(measured, options, strict=True)
    ]
    room = budget - sum(schemes[0].bits(item.spec.shape, scale_bits) for item, schemes in zip(measured, options, strict=True))
    grain = max(1.0, room / _GRAINS)
    least = np.zeros(_GRAINS + 1)  # divergence of the matrices so far, by the grains that they may take
    choices = []
    for item, schemes, bits in zip(measured, options, extra, strict=True):
        costs = np.full((len(schemes), _GRAINS + 1), np.inf)
        for row, scheme in enumerate(schemes):
            grains = ceil(bits[row] / grain)
            if grains <= _GRAINS:
                costs[row, grains:] = least[: _GRAINS + 1 - grains] + item.kl[scheme]
        choices.append(costs.argmin(0))
        least = costs.min(0)
    left, chosen = _GRAINS, {}
    for item, schemes, bits, choice in zip(reversed(measured), reversed(options), reversed(extra), reversed(choices), strict=True):
        row = int(choice[left])
        chosen[item.spec.name] = schemes[row]
        left -= ceil(bits[row] / grain)
    return {item.spec.name: chosen[item.spec.name] for item in measured}


def _extreme_bits(
    specs: Sequence[WeightSpec],
    offered: Mapping[str, Sequence[CodedScheme]],
    base: Recipe,
    which: Callable[..., CodedScheme],
) -> float:
    """Bits per weight with the scheme of `which` (`min` or `max`) size everywhere."""
    scale_bits = base.scale_bits
    chosen = {spec.name: which(offered[spec.name], key=lambda s: s.bits(spec.shape, scale_bits)) for spec in specs if spec.name in offered}
    return sum(_bits(spec, chosen, base, scale_bits) for spec in specs) / sum(spec.size for spec in specs)


def _bits(spec: WeightSpec, chosen: Mapping[str, CodedScheme], base: Recipe, scale_bits: int) -> int:
    if spec.name in chosen:
        return chosen[spec.name].bits(spec.shape, scale_bits)
    return (base.norms if spec.role.is_norm else base.fallback).bits(spec.shape, scale_bits)


def _rules(chosen: Mapping[str, CodedScheme], specs: Mapping[str, WeightSpec]) -> tuple[Rule, ...]:
    """One rule for each run of layers whose matrices of one role share a scheme; the most common scheme ends the list, for all the rest."""
    sizes: dict[CodedScheme, int] = {}
    for name, scheme in chosen.items():
        sizes[scheme] = sizes.get(scheme, 0) + specs[name].size
    common = max(sizes, key=lambda scheme: sizes[scheme])
    rules = []
    for role in Role:
        of_role = [specs[name] for name in chosen if specs[name].role is role]
        for scheme, run in groupby(of_role, key=lambda spec: chosen[spec.name]):
            layers = [spec.layer for spec in run]
            if scheme != common:
                first, last = layers[0], layers[-1]
                rules.append(Rule(scheme, frozenset({role}), None if first is None or last is None else Between(first, last)))
    return (*rules, Rule(common))


def _words(chosen: Mapping[str, CodedScheme]) -> str:
    kinds = sorted({str(scheme) for scheme in chosen.values()})
    return f"each matrix as its sensitivity asks for: {'; '.join(kinds)}"
