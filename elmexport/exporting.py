"""Export of a checkpoint to an artifact folder, complete and checked, or not at all."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, Unpack

import msgspec

from calibration.allocate import drop_name, mixed_name
from calibration.facts import rounded
from calibration.options import WeightOptions
from calibration.preparation import prepare
from calibration.residual import DEFAULT_ALPHA, choose_alpha
from calibration.statistics import Statistics
from elmexport import __version__
from elmexport.artifact import artifact_folder, check_free, write_manifest
from elmexport.card import write_card
from elmexport.checkpoint import open_checkpoint, open_tokenizer, require_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError, Fp16RangeError, MissingDependencyError
from elmexport.evaluation.self_check import ReferenceRun, check_texts, reference_pass, self_check
from elmexport.evaluation.step_up import measure_step_up
from elmexport.evaluation.task_drop import TaskDrop
from elmexport.evaluation.tasks.suite import require_lm_eval
from elmexport.files import check_writable
from elmexport.graph.device import torch_device
from elmexport.graph.rescale import rescale
from elmexport.importance import read_importance
from elmexport.manifest import FORMAT, Calibration, Fallback, Manifest, Model, Quantization, SelfCheck
from elmexport.memory import give_back
from elmexport.models import trace
from elmexport.progress import Progress, SilentProgress
from elmexport.quantization.recipe_file import write_recipe
from elmexport.quantization.recipes import Plan, Recipe, load_recipe, resolve
from elmexport.quantization.schemes import Float
from elmexport.runtimes.probing import vouch
from elmexport.target import Checked, ExportJob, Target, Written, find_target, wider_formats

RECIPE = "recipe.toml"  # in the artifact, where --bits-per-weight or --max-drop chose it


class ExportOptions(TypedDict, total=False):
    """Keyword arguments of `export` and `export_checkpoint`; `export_checkpoint` says what each means and its default."""

    out: Path | None
    context: int | None
    weights: WeightOptions | None
    verify: bool
    force: bool
    settings: Mapping[str, Any] | None


@dataclass(frozen=True)
class ExportResult:
    """A finished export."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]  # what the user should know that is not an error, tensors that their scheme could not take among it
    has_tokenizer: bool  # whether the artifact turns text into tokens by itself


def export(
    model: str,
    target: str,
    quant: str | None = None,
    *,
    random_weights: int | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    adapter: Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[ExportOptions],
) -> ExportResult:
    """Export `model` (an alias, hub id, or path) to `target`; see `open_checkpoint` and `export_checkpoint`.

    `adapter` is merged into the model. A model with weights of its own is not exported without a tokenizer, unless `tokenizer` is "none".

    Raises:
        ElmExportError: see `open_checkpoint` and `export_checkpoint`.
    """
    progress = progress or SilentProgress()
    chosen = find_target(target, options.get("settings"))
    read_recipe(chosen, quant)  # a misspelt option must not cost a download
    torch_device()
    out = options.get("out")
    if out is not None:
        check_free(out, force=options.get("force", False))
    else:
        check_writable(Path(target))  # the name is found later, and lies beside
    weights = options.get("weights")
    if weights is not None and weights.max_drop is not None:
        require_lm_eval("--bits-per-weight finds a mix of a size, by sensitivity alone")
    if weights is not None and weights.save_weights_to is not None:
        check_writable(weights.save_weights_to, "--save-weights")
    checkpoint = open_checkpoint(
        model, revision=revision, tokenizer=tokenizer, random_weights=random_weights, adapter=adapter, progress=progress
    )
    if tokenizer is None and random_weights is None:
        checkpoint.tokenizer_path = require_tokenizer(checkpoint)
    result = export_checkpoint(checkpoint, target, quant, progress=progress, **options)
    if checkpoint.tokenizer_path is None and tokenizer is None:
        note = "no tokenizer found, so the artifact holds none; pass --tokenizer a tokenizer.model or tokenizer.json"
        result = replace(result, notes=(*result.notes, note))
    return result


def export_checkpoint(
    checkpoint: Checkpoint,
    target: str,
    quant: str | None = None,
    *,
    out: Path | None = None,
    context: int | None = None,
    weights: WeightOptions | None = None,
    verify: bool = True,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export an open checkpoint: trace, quantize, write, check.

    `quant` is one of the target's (its first where None) or the path of a recipe, `context` the tokens of the KV cache (the model's
    maximum where None), `out` the artifact folder (`./<model>-<target>-<quant>` where None). `weights` says how codes are found. For fp16
    targets the residual stream is measured, unless `weights.calibrate` is "none": then a safe default is assumed. `verify` runs the
    artifact against the model on a short text. `settings` are the target's own.

    Raises:
        ElmExportError: bad input, or something that the target cannot express; nothing is left behind.
        VerificationError: the artifact is far from the model; it has been discarded.
    """
    progress = progress or SilentProgress()
    chosen = find_target(target, settings)
    options = weights or WeightOptions()
    recipe = read_recipe(chosen, quant)
    config = checkpoint.config
    context = config.dims.context if context is None else context
    name = recipe.name
    if options.bits_per_weight is not None:
        name = mixed_name(options.bits_per_weight)
    elif options.max_drop is not None:
        name = drop_name(options.max_drop)
    out = out or Path(f"{checkpoint.source.name}-{target}-{name}")
    check_free(out, force=force)
    chosen.check(config, context)
    progress.stage("tracing")
    graph = trace(config, context)
    tokenizer = open_tokenizer(checkpoint)
    spoken = () if tokenizer is None else chosen.check_tokenizer(tokenizer)

    @cache
    def reference() -> ReferenceRun:
        run = reference_pass(checkpoint, graph, tokenizer, progress)
        give_back()
        return run

    if not options.mixes:  # what a search for bits will choose is not known before it
        chosen.check_plan(graph, resolve(recipe, config))
    checkpoint.identity(progress)  # for the manifest and for what is kept between runs; hashed here, where a bar shows it
    with _advice_of(chosen):
        prepared = prepare(
            checkpoint,
            chosen,
            recipe,
            options,
            progress,
            short_pass=lambda: reference().statistics,
            importance=None if options.importance_matrix is None else read_importance(options.importance_matrix, checkpoint),
            measure_drop=None if options.max_drop is None else TaskDrop(checkpoint, progress).measure,
        )
    plan, recipe = prepared.plan, prepared.plan.recipe
    if verify:
        reference()  # before anything is written
    alpha, calibration = 1.0, None
    if recipe.activations.dtype == "fp16":
        statistics = prepared.statistics
        if options.calibrate != "none" and (statistics is None or statistics.residual_peak is None):
            statistics = reference().statistics
        alpha, calibration = _alpha(statistics, checkpoint)
    notes = [*checkpoint.notes, *spoken, *prepared.notes, *(f"{name}: {reason}" for name, reason in plan.fallbacks)]
    if context > config.dims.context:
        notes.append(f"the model was trained on {config.dims.context} tokens; what it says beyond them may be poor (context {context})")

    with _advice_of(chosen), artifact_folder(out, force=force) as folder:
        progress.stage(f"writing {target}", config.parameter_count)
        job = ExportJob(checkpoint.source.name, config, rescale(graph, alpha), prepared.weights, tokenizer, progress.advance)
        written = chosen.write(job, folder) or Written()
        vouch(chosen.name, folder)
        give_back()
        notes += written.notes
        if options.mixes:
            write_recipe(recipe, folder / RECIPE, f"chosen for {checkpoint.source.name}; use it again with --quant {RECIPE}")
        checked = SelfCheck(done=False, reason="not asked for")
        if verify:
            checked, note = _self_check(chosen, folder, reference(), recipe, context, progress)
            notes += note
            give_back()
            if checked.done and _loses(plan):
                step = measure_step_up(chosen, plan, checkpoint, graph, reference(), progress)
                checked = msgspec.structs.replace(checked, step_up=step)
            if checked.done and tokenizer is not None:
                check_texts(chosen.name, folder, tokenizer, plain=bool(spoken))
        manifest = Manifest(
            format=FORMAT,
            model=_model(checkpoint),
            target=chosen.name,
            settings=chosen.settings(),
            quant=msgspec.convert({**recipe.to_dict(), **prepared.facts}, Quantization),
            fallbacks=tuple(Fallback(tensor, reason) for tensor, reason in plan.fallbacks),
            bits_per_weight=round(plan.bits_per_weight, 4),
            context=context,
            alpha=alpha,
            calibration=calibration,
            tools={"elmexport": __version__, "python": platform.python_version(), "torch": version("torch"), **chosen.tools()},
            self_check=checked,
            chain=written.chain,
            files={},
        )
        write_card(folder, manifest)
        manifest = write_manifest(folder, manifest, progress)
    return ExportResult(out, manifest, tuple(notes), tokenizer is not None)


def read_recipe(target: Target, quant: str | None) -> Recipe:
    """The recipe that `quant` names (the target's first where None), or that lies in the file `quant` (a path that ends in .toml).

    Raises:
        ElmExportError: the target has no such recipe, the file cannot be read, or see `load_recipe`.
    """
    if quant is None or not quant.endswith(".toml"):
        return target.recipe(target.quants[0] if quant is None else quant)
    try:
        recipe = load_recipe(Path(quant))
    except OSError as error:
        raise ElmExportError(
            f"cannot read the recipe {quant}: {error.strerror or error}; --quant takes {', '.join(target.quants)}, or a .toml file"
        ) from None
    except UnicodeDecodeError:
        raise ElmExportError(f"{quant} is not UTF-8 text; --quant takes a recipe as a TOML file") from None
    if re.fullmatch(r"\w[\w.+-]*", recipe.name) is None:
        raise ElmExportError(f"{quant}: name is {recipe.name!r}; it becomes part of file names, so letters, digits and . + - _ only")
    return target.adapt(recipe)


@contextmanager
def _advice_of(target: Target) -> Iterator[None]:
    """Give errors about fp16's range an advice that the format of `target` has a use for."""
    try:
        yield
    except Fp16RangeError as error:
        raise ElmExportError(f"{error.found}; {wider_formats(target)}") from None


def _loses(plan: Plan) -> bool:
    """Whether something is quantized."""
    return any(not isinstance(scheme, Float) for scheme in plan.schemes.values())


def _alpha(statistics: Statistics | None, checkpoint: Checkpoint) -> tuple[float, Calibration]:
    """The factor on the residual stream, and how it was found."""
    if statistics is None or statistics.residual_peak is None:
        return DEFAULT_ALPHA, Calibration("default", None, 0)
    # The stream of a token that the text does not have starts at its row of the embedding, however large that is.
    largest = max(abs(float(end)) for end in checkpoint.tensor(checkpoint.embedding_name).aminmax())
    peak, facts = rounded(max(statistics.residual_peak, largest)), statistics.facts
    return choose_alpha(peak), Calibration("measured", facts.text, facts.tokens, peak)


def _self_check(
    target: Target, folder: Path, reference: ReferenceRun, recipe: Recipe, context: int, progress: Progress
) -> tuple[SelfCheck, list[str]]:
    try:
        result, logits = self_check(target, folder, reference, recipe.max_self_check_kl, progress)
    except MissingDependencyError as error:
        return SelfCheck(done=False, reason=str(error)), [f"self-check not done: {error}"]
    target.finish(folder, Checked(reference.ids, reference.logits, logits, context))
    found = SelfCheck(
        done=True,
        text=reference.text,
        tokens=result.tokens,
        kl_mean=rounded(result.kl_mean),
        kl_max=rounded(result.kl_max),
        top1_agreement=rounded(result.top1_agreement),
    )
    return found, []


def _model(checkpoint: Checkpoint) -> Model:
    source, config = checkpoint.source, checkpoint.config
    return Model(source.name, source.origin, source.revision, checkpoint.identity(), config.parameter_count, config.to_dict())
