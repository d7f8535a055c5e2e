"""Preparation of an export's weights: the plan, the method's codes under it, and the choice of bits around both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from calibration.budget import MINUTES
from calibration.calibrated import save_weights
from calibration.guard import not_worse_than_mse
from calibration.inputs import Inputs
from calibration.method import Job, Prepared
from calibration.methods import DEFAULT
from calibration.mixed import MeasureDrop, Search, of_size, within_drop
from calibration.options import WeightOptions
from calibration.statistics import Statistics
from calibration.stored import read_set
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.progress import Progress
from elmexport.quantization.ggml import GgmlType
from elmexport.quantization.ggml_coded import coded
from elmexport.quantization.recipes import Plan, Recipe, resolve
from elmexport.quantization.schemes import CodedScheme
from elmexport.quantization.weight_source import WeightSource
from elmexport.target import Target

TRIAL_TOKENS = 4096  # of the calibration text, for trials that say what a method gains


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

    def job(plan: Plan, inputs: Inputs) -> Job:
        short = short_pass if options.calibrate == "auto" else None
        return Job(checkpoint, plan, inputs, progress, short, MINUTES if options.minutes is None else options.minutes)

    def find(plan: Plan) -> WeightSource:
        few = inputs.with_tokens(min(TRIAL_TOKENS, options.tokens or TRIAL_TOKENS)) if options.reads_text else inputs
        return method.prepare(job(plan, few)).weights

    def under(chosen: Recipe) -> Prepared:
        if options.method != DEFAULT or options.weights_from is not None:
            chosen = with_own_codes(chosen)
        plan = resolve(chosen, checkpoint.config)
        check_schemes(target, checkpoint, plan)
        check_method(plan, options.method)
        if options.weights_from is not None:
            return read_set(checkpoint, plan, options.weights_from)
        return method.prepare(job(plan, inputs))

    def finish(chosen: Recipe) -> Prepared:
        prepared = under(chosen)
        if not method.needs_text or options.weights_from is not None or prepared.facts["method"] == "mse":
            return prepared
        return not_worse_than_mse(replace(job(prepared.plan, inputs), short_pass=short_pass), prepared)

    search = Search(checkpoint, target, recipe, find if method.needs_text else None, under, finish, progress)
    if options.max_drop is not None:
        assert measure_drop is not None
        prepared = within_drop(search, options.max_drop, measure_drop)
    elif options.bits_per_weight is not None:
        prepared = of_size(search, options.bits_per_weight)
    else:
        prepared = finish(recipe)
    if options.save_weights_to is not None:
        save_weights(checkpoint, prepared, options.save_weights_to)
    return prepared


def with_own_codes(recipe: Recipe) -> Recipe:
    """Replace ggml's types by schemes of the same bytes whose codes this project finds."""
    return replace(
        recipe,
        rules=tuple(replace(rule, scheme=coded(rule.scheme)) if isinstance(rule.scheme, GgmlType) else rule for rule in recipe.rules),
    )


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


def check_schemes(target: Target, checkpoint: Checkpoint, plan: Plan) -> None:
    """Make sure that `target` can hold every tensor as `plan` wants it.

    Raises:
        ElmExportError: it cannot.
    """
    for name, spec in checkpoint.specs.items():
        reason = target.refuses(plan.schemes[name], spec.role)
        if reason is not None:
            raise ElmExportError(f"recipe {plan.recipe.name} stores {name} ({spec.role}) as {plan.schemes[name]}; {target.name} {reason}")


def check_method(plan: Plan, method: str) -> None:
    """Make sure that `method` is defined for every scheme of `plan`.

    Raises:
        ElmExportError: it is not.
    """
    if method != "rtn":
        return
    for name, scheme in plan.schemes.items():
        if isinstance(scheme, CodedScheme) and not scheme.has_rtn:
            raise ElmExportError(
                f"--method rtn does not exist for {scheme}, as recipe {plan.recipe.name} stores {name}: its parameters are searched; choose --method {DEFAULT}"
            )
