"""What becomes of a model's weights in an export: which method finds the codes, from what, under which plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from calibration.statistics import mean_square_of
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.progress import Progress
from elmexport.quantization.ggml import GgmlType
from elmexport.quantization.recipes import Plan, Recipe, resolve
from elmexport.quantization.schemes import CodedScheme
from elmexport.quantization.weight_source import CheckpointWeights, WeightSource
from elmexport.target import Target

if TYPE_CHECKING:
    from calibration.statistics import Statistics
    from calibration.text import Sample
    from calibration.weight_set import WeightSet
    from elmexport.evaluation.self_check import Reference

Method = Literal["mse", "rtn", "gptq", "awq", "awq+gptq"]
Calibrate = Literal["auto", "none"] | Path


@dataclass(frozen=True)
class WeightOptions:
    """What a user may ask for.

    `method` finds the codes: "rtn" rounds to nearest, "mse" searches scales of least squared error, "gptq" cancels errors over a text, "awq"
    rescales input channels first. `calibrate` "auto" is the bundled text where the method needs one, and for "mse" the few tokens that every
    export reads; "none" is nothing; a file is statistics (`.safetensors`), llama.cpp's importance matrix (`.gguf`) or a text. `tokens` says how
    much of a text to read (32,768 where None). `weights_from` is a weight set to take the codes from, `save_weights_to` where to keep those
    found. `bits_per_weight` lets each matrix have the scheme that its sensitivity asks for; `max_drop` finds the smallest such mix that loses at
    most so many percentage points of accuracy.
    """

    method: Method = "mse"
    calibrate: Calibrate = "auto"
    tokens: int | None = None
    weights_from: Path | None = None
    save_weights_to: Path | None = None
    bits_per_weight: float | None = None
    max_drop: float | None = None

    def check(self) -> None:
        """
        Raises:
            ElmExportError: an unknown method, a method that needs what is not given, or options that have no use together.
        """
        if self.method not in get_args(Method):
            raise ElmExportError(f"--method {self.method} does not exist; choose {', '.join(get_args(Method))}")
        if self.bits_per_weight is not None and self.max_drop is not None:
            raise ElmExportError("--bits-per-weight gives the size, --max-drop finds it; leave one of them out")
        if self.max_drop is not None and not 0 <= self.max_drop < 100:
            raise ElmExportError(f"--max-drop is {self.max_drop:g}; it is in percentage points of accuracy, from 0 up to 100")
        if self.weights_from is not None and (self.method != "mse" or self.tokens is not None or self.mixes):
            raise ElmExportError("--weights-from brings the codes; leave --method, --tokens, --bits-per-weight and --max-drop out")
        if self.calibrate == "none" and self.needs_text:
            raise ElmExportError(f"--method {self.method} is calibrated; leave --calibrate none out, or choose --method mse")
        if self.tokens is not None and not self.reads_text:
            raise ElmExportError("--tokens is how much of a calibration text to read, and none is read here; leave it out")
        if self.save_weights_to is not None and "gptq" not in self.method:
            raise ElmExportError(f"--method {self.method} finds codes as it writes them; --save-weights is for --method gptq")

    @property
    def mixes(self) -> bool:
        """Whether schemes are chosen matrix by matrix."""
        return self.bits_per_weight is not None or self.max_drop is not None

    @property
    def needs_text(self) -> bool:
        return self.method not in ("mse", "rtn")

    @property
    def reads_text(self) -> bool:
        """Whether a text is read, rather than statistics or nothing."""
        return self.calibrate.suffix not in (".safetensors", ".gguf") if isinstance(self.calibrate, Path) else self.needs_text


@dataclass(frozen=True)
class Prepared:
    """The weights of an export, ready to be written, and what is known of them."""

    weights: WeightSource
    statistics: Statistics | None  # of the model's activations, where they were measured or given
    facts: Mapping[str, Any]  # for the manifest's `quant`
    notes: tuple[str, ...] = ()  # what the user should know that is not an error

    @property
    def plan(self) -> Plan:
        return self.weights.plan


def prepare(
    checkpoint: Checkpoint,
    target: Target,
    recipe: Recipe,
    options: WeightOptions,
    progress: Progress,
    reference: Callable[[], Reference] | None = None,
) -> Prepared:
    """Do all that comes before the first tensor is written.

    `reference` gives the model's own pass over a short text; its mean squares weight the errors of `mse` where nothing else was given to
    weight them with.

    Raises:
        ElmExportError: a scheme that the target cannot express, options without use, unusable files, or weights that do not fit.
    """
    options.check()
    if not options.mixes:
        return _planned(checkpoint, target, recipe, options, progress, reference)
    from calibration.mixed import of_size, within_drop

    def mixed(chosen: Recipe, final: bool) -> Prepared:
        own = options if final else replace(options, save_weights_to=None)
        return _planned(checkpoint, target, chosen, own, progress, reference)

    gptq = "gptq" in options.method
    if options.max_drop is not None:
        return within_drop(checkpoint, target, recipe, options.max_drop, mixed, gptq=gptq, progress=progress)
    assert options.bits_per_weight is not None
    return of_size(checkpoint, target, recipe, options.bits_per_weight, mixed, gptq=gptq, progress=progress)


def _planned(
    checkpoint: Checkpoint,
    target: Target,
    recipe: Recipe,
    options: WeightOptions,
    progress: Progress,
    reference: Callable[[], Reference] | None,
) -> Prepared:
    plan = resolve(recipe, checkpoint.config)
    check_schemes(target, checkpoint, plan)
    if options.method != "mse" and any(isinstance(scheme, GgmlType) for scheme in plan.schemes.values()):
        raise ElmExportError(f"--quant {recipe.name} leaves the codes to ggml's own quantizer; leave --method out, see --imatrix")
    if options.weights_from is not None:
        return _stored(checkpoint, plan, options.weights_from)
    if options.method == "mse" and options.calibrate == "auto" and reference is not None and _searches(plan):
        return _weighted_by(reference(), checkpoint, plan)
    return _found(checkpoint, plan, options, progress)


def _searches(plan: Plan) -> bool:
    """Whether `mse` has something to search: 8-bit integers have scales from their largest value."""
    return any(isinstance(scheme, CodedScheme) and scheme.uses_importance for scheme in plan.schemes.values())


def _weighted_by(reference: Reference, checkpoint: Checkpoint, plan: Plan) -> Prepared:
    text = {"text": reference.text, "text_sha256": reference.text_sha256, "tokens": len(reference.ids), "sequential": False}
    planned = CheckpointWeights(checkpoint, plan, "mse", mean_square_of(reference.moments))
    return Prepared(planned, None, {"method": "mse", "calibration": text})


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
        planned = CheckpointWeights(checkpoint, plan, options.method, None if statistics is None else mean_square_of(statistics.moments))
        weighted = statistics is not None and options.method == "mse"
        text = _text_of(statistics) if statistics is not None and weighted else None
        return Prepared(planned, statistics, {"method": options.method, "calibration": text})

    from calibration.awq import awq_folds
    from calibration.calibrated import gptq_weights, moments_of, save_weights
    from calibration.folding import FoldedCheckpoint

    def fold() -> FoldedCheckpoint:
        measured = statistics or _collect(checkpoint, sample, progress)
        return FoldedCheckpoint(checkpoint, awq_folds(checkpoint, lambda spec: plan.schemes[spec.name], measured))

    if options.method == "awq":
        assert statistics is not None
        folded = fold()
        planned = CheckpointWeights(folded, plan, "mse", mean_square_of(moments_of(folded, statistics)))
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
        if options.calibrate.suffix == ".gguf":
            from targets.gguf.statistics import statistics_from_imatrix  # the format's package knows the names of its tensors

            return statistics_from_imatrix(options.calibrate, checkpoint), None
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
    from calibration.weight_set import StoredWeights

    facts = weights.facts
    text = {"text": facts.text, "text_sha256": facts.text_sha256, "tokens": facts.tokens, "sequential": facts.sequential}
    planned = StoredWeights(checkpoint, plan, weights)
    notes = tuple(
        f"{name}: its Hessian was not positive definite and took {value:g} of its mean diagonal as damping (0.01 is usual); calibrate on more text"
        for name, value in weights.damped().items()
    )
    return Prepared(planned, statistics, {"method": facts.method, "calibration": text}, notes)


def _text_of(statistics: Statistics) -> dict[str, Any]:
    facts = statistics.facts
    return {"text": facts.text, "text_sha256": facts.text_sha256, "tokens": facts.tokens, "sequential": False}


def rounded(value: float) -> float:
    """Four significant digits: what differs between machines or thread counts does not belong in a reproducible file."""
    return float(f"{value:.4g}")
