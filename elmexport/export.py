"""The export: a checkpoint goes in, an artifact folder comes out, complete and checked, or nothing does."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from calibration.residual import DEFAULT_ALPHA, choose_alpha
from elmexport import __version__
from elmexport.artifact import artifact_folder, check_free, write_manifest
from elmexport.checkpoint import open_checkpoint, require_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import check_vocabulary, load_tokenizer
from elmexport.errors import MissingDependencyError
from elmexport.evaluation.self_check import Reference, reference_pass, self_check
from elmexport.graph.rescale import rescale
from elmexport.graph.trace import trace
from elmexport.progress import Progress, SilentProgress
from elmexport.quantization.planned import PlannedWeights
from elmexport.quantization.recipes import Plan, Recipe, resolve
from elmexport.target import ExportJob, Target, find_target

Calibrate = Literal["auto", "none"]


class ExportOptions(TypedDict, total=False):
    """What both `export` and `export_checkpoint` take by keyword; `export_checkpoint` says what each means and its default."""

    out: Path | None
    context: int | None
    calibrate: Calibrate
    verify: bool
    force: bool
    settings: Mapping[str, Any] | None


@dataclass(frozen=True)
class ExportResult:
    """A finished export."""

    path: Path
    manifest: Mapping[str, Any]
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
    progress: Progress | None = None,
    **options: Unpack[ExportOptions],
) -> ExportResult:
    """Export `model` (an alias, hub id, or path) to `target`; see `open_checkpoint` and `export_checkpoint`.

    A model with weights of its own is not exported without a tokenizer, unless `tokenizer` is "none".

    Raises:
        ElmExportError: see `open_checkpoint` and `export_checkpoint`.
    """
    progress = progress or SilentProgress()
    chosen = find_target(target, options.get("settings"))
    chosen.recipe(quant or chosen.quants[0])  # a misspelt option must not cost a download
    out = options.get("out")
    if out is not None:
        check_free(out, force=options.get("force", False))
    checkpoint = open_checkpoint(model, revision=revision, tokenizer=tokenizer, random_weights=random_weights, progress=progress)
    if tokenizer is None and random_weights is None:
        checkpoint.tokenizer_path = require_tokenizer(checkpoint)
    return export_checkpoint(checkpoint, target, quant, progress=progress, **options)


def export_checkpoint(
    checkpoint: Checkpoint,
    target: str,
    quant: str | None = None,
    *,
    out: Path | None = None,
    context: int | None = None,
    calibrate: Calibrate = "auto",
    verify: bool = True,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Trace, quantize, write, check.

    `quant` is one of the target's (its first where None), `context` the tokens of the KV cache (the model's maximum where None), `out`
    the artifact folder (`./<model>-<target>-<quant>` where None). `calibrate` "auto" measures the residual stream for fp16 targets,
    "none" assumes a safe default. `verify` runs the artifact against the model on a short text. `settings` are the target's own.

    Raises:
        ElmExportError: bad input, or something that the target cannot express; nothing is left behind.
        VerificationError: the artifact is far from the model; it has been discarded.
    """
    progress = progress or SilentProgress()
    chosen = find_target(target, settings)
    recipe = chosen.recipe(quant or chosen.quants[0])
    config = checkpoint.config
    context = config.max_context_length if context is None else context
    out = out or Path(f"{checkpoint.source.name}-{target}-{recipe.name}")
    check_free(out, force=force)
    chosen.check(config, context)
    graph = trace(config, context)
    tokenizer = None if checkpoint.tokenizer_path is None else load_tokenizer(checkpoint.tokenizer_path)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config)

    rescales = recipe.activations.dtype == "fp16"
    reference = None
    if verify or (rescales and calibrate == "auto"):
        reference = reference_pass(checkpoint, graph, tokenizer, progress)
    alpha, calibration = _alpha(reference if calibrate == "auto" else None) if rescales else (1.0, None)
    plan = resolve(recipe, config.weights())
    notes = [f"{name}: {reason}" for name, reason in plan.fallbacks]
    if context > config.max_context_length:
        notes.append(
            f"the model was trained on {config.max_context_length} tokens; what it says beyond them may be poor (context {context})"
        )
    if tokenizer is None:
        notes.append("no tokenizer found, so the artifact holds none; pass --tokenizer a tokenizer.model or tokenizer.json")

    with artifact_folder(out, force=force) as folder:
        progress.stage(f"writing {target}", config.parameter_count)
        job = ExportJob(checkpoint.source.name, rescale(graph, alpha), PlannedWeights(checkpoint, plan), tokenizer, progress.advance)
        chosen.write(job, folder)
        manifest = _describe(checkpoint, chosen, recipe, plan, context, alpha, calibration)
        if verify and reference is not None:
            manifest["self_check"], note = _self_check(target, folder, reference, recipe, progress)
            notes += note
        write_manifest(folder, manifest)
    return ExportResult(out, manifest, tuple(notes), tokenizer is not None)


def _alpha(reference: Reference | None) -> tuple[float, dict[str, Any]]:
    """The factor on the residual stream, and how it was found, for the manifest."""
    if reference is None:
        return DEFAULT_ALPHA, {"method": "default", "text": None, "tokens": 0}
    peak = _rounded(reference.residual_peak)
    return choose_alpha(peak), {"method": "measured", "text": reference.text, "tokens": len(reference.ids), "residual_peak": peak}


def _self_check(target: str, folder: Path, reference: Reference, recipe: Recipe, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    try:
        result = self_check(target, folder, reference, recipe.max_self_check_kl, progress)
    except MissingDependencyError as error:
        return {"done": False, "reason": str(error)}, [f"self-check not done: {error}"]
    figures = {"kl_mean": _rounded(result.kl_mean), "kl_max": _rounded(result.kl_max), "top1_agreement": _rounded(result.top1_agreement)}
    return {"done": True, "text": reference.text, "tokens": result.tokens, **figures}, []


def _describe(
    checkpoint: Checkpoint, target: Target, recipe: Recipe, plan: Plan, context: int, alpha: float, calibration: dict[str, Any] | None
) -> dict[str, Any]:
    source = checkpoint.source
    return {
        "model": {
            "name": source.name,
            "source": source.origin,
            "revision": source.revision,
            "identity": checkpoint.identity(),
            "parameters": checkpoint.config.parameter_count,
            "config": checkpoint.config.to_dict(),
        },
        "target": target.name,
        "quant": recipe.to_dict(),
        "fallbacks": [{"tensor": name, "reason": reason} for name, reason in plan.fallbacks],
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "context": context,
        "alpha": alpha,
        "calibration": calibration,
        "tools": {"elmexport": __version__, "python": platform.python_version(), "torch": version("torch"), **target.tools()},
        "self_check": {"done": False, "reason": "not asked for"},
    }


def _rounded(value: float) -> float:
    """Four significant digits: what differs between machines or thread counts does not belong in a reproducible file."""
    return float(f"{value:.4g}")
