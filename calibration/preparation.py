"""What becomes of a model's weights in an export: which method finds the codes, from what, under which plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.progress import Progress
from elmexport.quantization.ggml import GgmlType
from elmexport.quantization.planned import OnTheFly, PlannedWeights
from elmexport.quantization.recipes import Plan, Recipe, resolve
from elmexport.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from calibration.sensitivity import Probe
    from calibration.statistics import Statistics
    from calibration.text import Sample
    from calibration.weight_set import WeightSet

Method = Literal["mse", "rtn", "gptq", "awq", "awq+gptq"]
Calibrate = Literal["auto", "none"] | Path


@dataclass(frozen=True)
class WeightOptions:
    """What a user may ask for.

    `method` finds the codes: "rtn" rounds to nearest, "mse" searches scales of least squared error, "gptq" cancels errors over a text, "awq"
    rescales input channels first. `calibrate` "auto" is the bundled text where the method needs one, "none" nothing, a file is statistics
    (`.safetensors`) or a text. `tokens` says how much of a text to read (32,768 where None). `weights_from` is a weight set to take the codes
    from, `save_weights_to` where to keep those found. `bits_per_weight` lets each matrix have the scheme that its sensitivity asks for.
    """

    method: Method = "mse"
    calibrate: Calibrate = "auto"
    tokens: int | None = None
    weights_from: Path | None = None
    save_weights_to: Path | None = None
    bits_per_weight: float | None = None

    def check(self) -> None:
        """
        Raises:
            ElmExportError: an unknown method, a method that needs what is not given, or options that have no use together.
        """
        if self.method not in get_args(Method):
            raise ElmExportError(f"--method {self.method} does not exist; choose {', '.join(get_args(Method))}")
        if self.weights_from is not None and (self.method != "mse" or self.tokens is not None or self.bits_per_weight is not None):
            raise ElmExportError("--weights-from brings the codes; leave --method, --tokens and --bits-per-weight out")
        if self.calibrate == "none" and self.needs_text:
            raise ElmExportError(f"--method {self.method} is calibrated; leave --calibrate none out, or choose --method mse")
        if self.tokens is not None and not self.reads_text:
            raise ElmExportError("--tokens is how much of a calibration text to read, and none is read here; leave it out")
        if self.save_weights_to is not None and "gptq" not in self.method:
            raise ElmExportError(f"--method {self.method} finds codes as it writes them; --save-weights is for --method gptq")

    @property
    def needs_text(self) -> bool:
        return self.method not in ("mse", "rtn")

    @property
    def reads_text(self) -> bool:
        """Whether a text is read, rather than statistics or nothing."""
        return self.calibrate.suffix != ".safetensors" if isinstance(self.calibrate, Path) else self.needs_text


@dataclass(frozen=True)
class Prepared:
    """The weights of an export, ready to be written, and what is known of them."""

    weights: PlannedWeights
    statistics: Statistics | None  # of the model's activations, where they were measured or given
    facts: Mapping[str, Any]  # for the manifest's `quant`

    @property
    def plan(self) -> Plan:
        return self.weights.plan


def prepare(checkpoint: Checkpoint, target: Target, recipe: Recipe, options: WeightOptions, progress: Progress) -> Prepared:
    """Do all that comes before the first tensor is written.

    Raises:
        ElmExportError: a scheme that the target cannot express, options without use, unusable files, or weights that do not fit.
    """
    options.check()
    probe, allocation = None, None
    if options.bits_per_weight is not None:
        from calibration.allocate import choose_bits

        allocation, probe = choose_bits(
            checkpoint, target, recipe, options.bits_per_weight, gptq="gptq" in options.method, progress=progress
        )
        recipe = allocation.recipe
    plan = resolve(recipe, checkpoint.config.weights())
    check_schemes(target, checkpoint, plan)
    if options.method != "mse" and any(isinstance(scheme, GgmlType) for scheme in plan.schemes.values()):
        raise ElmExportError(f"--quant {recipe.name} leaves the codes to ggml's own quantizer; leave --method out, see --imatrix")
    prepared = _stored(checkpoint, plan, options.weights_from) if options.weights_from else _found(checkpoint, plan, options, progress)
    if allocation is None or probe is None:
        return prepared
    costs = {"asked": options.bits_per_weight, "predicted_kl": rounded(allocation.predicted_kl), **_measured(prepared, probe)}
    return Prepared(prepared.weights, prepared.statistics, {**prepared.facts, "allocation": costs})


def check_schemes(target: Target, checkpoint: Checkpoint, plan: Plan) -> None:
    """
    Raises:
        ElmExportError: `target` cannot hold a tensor as `plan` wants it.
    """
    for name, spec in checkpoint.specs.items():
        reason = target.refuses(plan.schemes[name], spec.role)
        if reason is not None:
            raise ElmExportError(f"recipe {plan.recipe.name} stores {name} ({spec.role}) as {plan.schemes[name]}; {target.name} {reason}")


def _stored(checkpoint: Checkpoint, plan: Plan, path: Path) -> Prepared:
    from calibration.weight_set import WeightSet

    weights = WeightSet.load(path)
    weights.check(checkpoint, plan)
    return _of_set(checkpoint, plan, weights, None)


def _found(checkpoint: Checkpoint, plan: Plan, options: WeightOptions, progress: Progress) -> Prepared:
    statistics, sample = _read(checkpoint, options, progress)
    if options.method == "mse" or options.method == "rtn":
        quantizer = OnTheFly(options.method, None if statistics is None else statistics.moments)
        weighted = statistics is not None and options.method == "mse"
        text = _text_of(statistics) if statistics is not None and weighted else None
        return Prepared(PlannedWeights(checkpoint, plan, quantizer), statistics, {"method": options.method, "calibration": text})

    from calibration.awq import awq_folds
    from calibration.calibrated import gptq_weights, moments_of, save_weights
    from calibration.folding import FoldedCheckpoint

    def fold() -> FoldedCheckpoint:
        measured = statistics or _collect(checkpoint, sample, progress)
        return FoldedCheckpoint(checkpoint, awq_folds(checkpoint, lambda spec: plan.schemes[spec.name], measured))

    if options.method == "awq":
        assert statistics is not None
        folded = fold()
        planned = PlannedWeights(folded, plan, OnTheFly("mse", moments_of(folded, statistics)))
        return Prepared(planned, statistics, {"method": options.method, "calibration": _text_of(statistics)})
    source = sample or statistics
    assert source is not None
    weights = gptq_weights(checkpoint, plan, source, progress, fold if options.method == "awq+gptq" else None)
    if options.save_weights_to is not None:
        save_weights(weights, options.save_weights_to)
    return _of_set(checkpoint, plan, weights, statistics)


def _read(checkpoint: Checkpoint, options: WeightOptions, progress: Progress) -> tuple[Statistics | None, Sample | None]:
    """Statistics, a text, or neither. Methods that do not run the model along the text get its statistics."""
    if not options.reads_text:
        if not isinstance(options.calibrate, Path):
            return None, None
        from calibration.statistics import load_statistics

        return load_statistics(options.calibrate, checkpoint), None
    from calibration.calibrate import DEFAULT_TOKENS, make_sample
    from calibration.text import read_text

    paths = [options.calibrate] if isinstance(options.calibrate, Path) else []
    tokens = DEFAULT_TOKENS if options.tokens is None else options.tokens
    sample = make_sample(checkpoint, [read_text(path, "--calibrate") for path in paths], text=paths, tokens=tokens)
    return (None, sample) if "gptq" in options.method else (_collect(checkpoint, sample, progress), None)


def _collect(checkpoint: Checkpoint, sample: Sample | None, progress: Progress) -> Statistics:
    from calibration.collect import collect

    assert sample is not None
    return collect(checkpoint, sample, progress=progress)


def _of_set(checkpoint: Checkpoint, plan: Plan, weights: WeightSet, statistics: Statistics | None) -> Prepared:
    facts = weights.facts
    text = {"text": facts.text, "text_sha256": facts.text_sha256, "tokens": facts.tokens, "sequential": facts.sequential}
    planned = PlannedWeights(checkpoint, plan, lambda weight, spec, scheme: weights.get(spec), weights.norms())
    return Prepared(planned, statistics, {"method": facts.method, "calibration": text})


def _text_of(statistics: Statistics) -> dict[str, Any]:
    facts = statistics.facts
    return {"text": facts.text, "text_sha256": facts.text_sha256, "tokens": facts.tokens, "sequential": False}


def _measured(prepared: Prepared, probe: Probe) -> dict[str, Any]:
    return {"measured_kl": rounded(probe.divergence(_Dequantized(prepared.weights))), "text": "bundled prose"}


class _Dequantized(Mapping[str, "Tensor"]):
    """Every tensor as the artifact will hold it, float32, made when it is asked for."""

    def __init__(self, weights: PlannedWeights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        import torch

        weight = self._weights.get(self._weights.checkpoint.specs[name])
        return weight.to(torch.float32) if isinstance(weight, torch.Tensor) else weight.dequantize()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.checkpoint.specs)

    def __len__(self) -> int:
        return len(self._weights.checkpoint.specs)


def rounded(value: float) -> float:
    """Four significant digits: what differs between machines or thread counts does not belong in a reproducible file."""
    return float(f"{value:.4g}")
