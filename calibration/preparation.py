"""Preparation of an export's weights: the plan, the method's codes under it, and the choice of bits around both."""

from __future__ import annotations

from collections.abc import Callable

from calibration.calibrated import save_weights
from calibration.inputs import Inputs
from calibration.method import Job, Prepared
from calibration.methods import DEFAULT
from calibration.mixed import MeasureDrop, of_size, within_drop
from calibration.options import WeightOptions
from calibration.statistics import Statistics
from calibration.stored import read_set
from calibration.weight_set import StoredWeights
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.progress import Progress
from elmexport.quantization.ggml import GgmlType
from elmexport.quantization.recipes import Plan, Recipe, resolve
from elmexport.target import Target


def prepare(
    checkpoint: Checkpoint,
    target: Target,
    recipe: Recipe,
    options: WeightOptions,
    progress: Progress,
    *,
    short_pass: Callable[[], Statistics] | None = None,
    importance: Statistics | None = None,
    measure_drop: MeasureDrop | None = None,
) -> Prepared:
    """Prepare the weights of an export: all that comes before the first tensor is written.

    What calibration cannot know is handed in. `short_pass` gives the statistics of the model's own pass over a few tokens, which weight the
    errors of "mse" where nothing else was given to weight them with; `importance` those that the options' importance matrix holds;
    `measure_drop` what weights cost in accuracy, for `max_drop`.

    Raises:
        ElmExportError: a scheme that the target cannot express, unusable files, or weights that do not fit.
    """
    method = options.find_method()
    if any(spec.role.is_expert for spec in checkpoint.specs.values()):
        _check_experts(options)
    inputs = Inputs(checkpoint, options, progress, importance)

    def under(chosen: Recipe) -> Prepared:
        plan = resolve(chosen, checkpoint.config)
        check_schemes(target, checkpoint, plan)
        if options.method != DEFAULT and any(isinstance(scheme, GgmlType) for scheme in plan.schemes.values()):
            raise ElmExportError(f"--quant {chosen.name} leaves the codes to ggml's own quantizer; leave --method out, see --imatrix")
        if options.weights_from is not None:
            return read_set(checkpoint, plan, options.weights_from)
        return method.prepare(Job(checkpoint, plan, inputs, progress, short_pass if options.calibrate == "auto" else None))

    if options.max_drop is not None:
        assert measure_drop is not None
        prepared = within_drop(checkpoint, target, recipe, options.max_drop, under, measure_drop, gain=method.gain, progress=progress)
    elif options.bits_per_weight is not None:
        prepared = of_size(checkpoint, target, recipe, options.bits_per_weight, under, gain=method.gain, progress=progress)
    else:
        prepared = under(recipe)
    if options.save_weights_to is not None:
        assert isinstance(prepared.weights, StoredWeights)
        save_weights(prepared.weights.weight_set, options.save_weights_to)
    return prepared


def _check_experts(options: WeightOptions) -> None:
    """Refuse what is not done for mixtures of experts.

    Raises:
        ElmExportError: which option, and what to do instead.
    """
    if options.mixes:
        raise ElmExportError(
            "a search for bits (--bits-per-weight, --max-drop) does not take mixtures of experts: formats store all experts of a layer in one type. "
            "Choose a --quant, or give a recipe by roles and layers"
        )
    if options.method.startswith("awq"):
        raise ElmExportError(f"--method {options.method} does not take mixtures of experts; choose --method gptq")


def check_schemes(target: Target, checkpoint: Checkpoint, plan: Plan) -> None:
    """Make sure that `target` can hold every tensor as `plan` wants it.

    Raises:
        ElmExportError: it cannot.
    """
    for name, spec in checkpoint.specs.items():
        reason = target.refuses(plan.schemes[name], spec.role)
        if reason is not None:
            raise ElmExportError(f"recipe {plan.recipe.name} stores {name} ({spec.role}) as {plan.schemes[name]}; {target.name} {reason}")
