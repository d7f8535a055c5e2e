"""Weight sets by GPTQ and distillation: computed once for a model, plan, method and text, then found in the cache.

Exports of one model to several formats so hold the same codes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from calibration.distill import HELD_OUT, distill, split
from calibration.experts import is_scarce
from calibration.folding import FoldedCheckpoint
from calibration.gptq import gptq
from calibration.method import Prepared
from calibration.sequential import quantize_in_order
from calibration.statistics import Moments, Statistics
from calibration.table import quantize_table
from calibration.text import Sample
from calibration.weight_set import FORMAT, StoredWeights, WeightFacts, WeightSet, WeightWriter, quantized_schemes, weight_writer
from elmexport import __version__
from elmexport.cache import cached_path, unwritable
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.files import complete_file, remove_all_stale
from elmexport.graph.device import torch_device
from elmexport.progress import Progress
from elmexport.quantization.codec import Quantized
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme
from elmexport.weights import Role, WeightSpec

_CODES = 3  # raised when the same inputs would give other codes, so that the cache does not answer with the former ones
MomentsOf = Callable[[WeightSpec], Moments | None]


def gptq_weights(
    checkpoint: Checkpoint,
    plan: Plan,
    source: Sample | Statistics,
    progress: Progress,
    fold: Callable[[], FoldedCheckpoint] | None = None,
    *,
    method: str = "gptq",
) -> WeightSet:
    """Compute the weights of `checkpoint` under `plan` by GPTQ, or take them out of the cache if they have been computed before.

    With a text (`Sample`), layer by layer in order (`quantize_in_order`); with statistics, each tensor by itself from its Hessian, without
    running the model. `fold` gives the model to quantize instead (AWQ); it is not called where the cache holds its result. `method` is what all
    of it is called.

    Raises:
        ElmExportError: statistics without Hessians, weights that do not fit their schemes, or a cache that cannot be written.
    """
    if isinstance(source, Statistics) and not source.facts.hessian:
        raise ElmExportError(
            "the statistics hold no Hessians, which gptq needs; make them with `elmexport calibrate --hessian`, or give a text to --calibrate"
        )
    facts = _facts(checkpoint, plan, source, method)
    if fold is not None:
        facts = replace(facts, folded=tuple(name for name, spec in checkpoint.specs.items() if _is_foldable(spec)))

    def fill(writer: WeightWriter) -> None:
        model = checkpoint if fold is None else fold()
        if isinstance(source, Sample):
            tensors = quantize_in_order(model, plan, source, progress, writer.damped, writer.scarce)
        else:
            tensors = _from_statistics(model, plan, moments_of(model, source), progress, writer)
        for name in facts.folded:
            writer.add_norm(name, model.tensor(name).to(torch.float32))
        for spec, quantized in tensors:
            writer.add(spec, quantized)

    path = _path(facts)
    return WeightSet.load(path) if path.is_file() else _written(path, facts, checkpoint, fill)


def distilled_weights(checkpoint: Checkpoint, plan: Plan, sample: Sample, progress: Progress) -> WeightSet:
    """Compute the weights of `checkpoint` under `plan` by GPTQ, then `distill`, or take them out of the cache.

    GPTQ and training read the same windows of `sample`, and the rest judges.

    Raises:
        ElmExportError: a text of too few windows to hold some out, or see `gptq_weights`.
    """
    train, held = split(sample)
    if not len(held.ids):
        raise ElmExportError(
            f"the calibration text gives {len(sample.ids)} windows of {sample.window} tokens; distillation needs at least {HELD_OUT}, "
            "to hold some out: give more text to --calibrate, or choose --method gptq"
        )
    facts = _facts(checkpoint, plan, sample, "distill")
    path = _path(facts)
    if path.is_file():
        return WeightSet.load(path)
    start = gptq_weights(checkpoint, plan, train, progress)
    found = distill(checkpoint, StoredWeights(checkpoint, plan, start), train, held, progress)
    facts = replace(facts, folded=tuple(found.norms), distilled={"before": found.before, "after": found.after, "steps": found.steps})

    def fill(writer: WeightWriter) -> None:
        for name, damping in start.damped().items():
            writer.damped(checkpoint.specs[name], damping)
        for name, tokens in start.scarce().items():
            writer.scarce(checkpoint.specs[name], tokens)
        for name, norm in found.norms.items():
            writer.add_norm(name, norm)
        for name in facts.schemes:
            spec = checkpoint.specs[name]
            writer.add(spec, found.tensors.get(name) or start.get(spec))

    return _written(path, facts, checkpoint, fill)


def _facts(checkpoint: Checkpoint, plan: Plan, source: Sample | Statistics, method: str) -> WeightFacts:
    if isinstance(source, Statistics):
        text, digest, tokens = source.facts.text, source.facts.text_sha256, source.facts.tokens
    else:
        text, digest, tokens = source.words, source.sha256, source.tokens
    return WeightFacts(
        model=checkpoint.source.name,
        identity=checkpoint.identity(),
        schemes=quantized_schemes(plan),
        folded=(),
        method=method,
        sequential=isinstance(source, Sample),
        text=text,
        text_sha256=digest,
        tokens=tokens,
        elmexport=__version__,
    )


def _path(facts: WeightFacts) -> Path:
    """Place of a weight set in the cache, by what it is computed from."""
    key = [FORMAT, _CODES, facts.identity, facts.schemes, facts.method, facts.sequential, facts.text_sha256, facts.tokens, __version__]
    return cached_path("weights", key, ".safetensors")


def _written(path: Path, facts: WeightFacts, checkpoint: Checkpoint, fill: Callable[[WeightWriter], None]) -> WeightSet:
    try:
        remove_all_stale(path.parent)
        with weight_writer(path, facts, checkpoint.specs) as writer:
            fill(writer)
    except OSError as error:
        raise unwritable(path, error) from error
    return WeightSet.load(path)


def moments_of(checkpoint: Checkpoint, statistics: Statistics) -> MomentsOf:
    """Give the moments of what each matrix of `checkpoint`, folded or not, reads; `statistics` are of the model that is not folded."""

    def get(spec: WeightSpec) -> Moments | None:
        moments = statistics.moments(spec)
        if moments is None or not isinstance(checkpoint, FoldedCheckpoint):
            return moments
        return checkpoint.moments(spec, moments)

    return get


def save_weights(checkpoint: Checkpoint, prepared: Prepared, out: Path) -> None:
    """Write the codes of `prepared` to the file `out`.

    Raises:
        ElmExportError: `out` cannot be written.
    """
    weights = prepared.weights
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(weights, StoredWeights):
            with complete_file(out) as partial:
                shutil.copyfile(weights.weight_set.path, partial)
            return
        assert prepared.statistics is not None, "codes that took the place of a method's are weighted"
        facts = _facts(checkpoint, prepared.plan, prepared.statistics, prepared.facts["method"])
        with weight_writer(out, facts, checkpoint.specs) as writer:
            for name in facts.schemes:
                quantized = weights.get(checkpoint.specs[name])
                assert isinstance(quantized, Quantized)
                writer.add(checkpoint.specs[name], quantized)
    except OSError as error:
        raise ElmExportError(f"cannot write {out}: {error.strerror or error}; choose another --save-weights") from error


def _is_foldable(spec: WeightSpec) -> bool:
    """Whether folding may change it though nothing quantizes it: the norms before attention and feed-forward network, and the router."""
    return spec.role in (Role.NORM_ATTENTION, Role.NORM_FFN, Role.MOE_ROUTER)


@torch.inference_mode()
def _from_statistics(
    checkpoint: Checkpoint, plan: Plan, moments_of: MomentsOf, progress: Progress, writer: WeightWriter
) -> Iterator[tuple[WeightSpec, Quantized]]:
    device = torch_device()
    specs = [spec for spec in checkpoint.specs.values() if isinstance(plan.schemes[spec.name], CodedScheme)]
    progress.stage("quantizing", sum(spec.size for spec in specs))
    for spec in specs:
        scheme = plan.schemes[spec.name]
        assert isinstance(scheme, CodedScheme)
        moments = moments_of(spec)
        hessian = None if moments is None or moments.hessian is None else moments.hessian.to(device)
        weight = checkpoint.tensor(spec.name).to(device)
        try:
            if hessian is None or (spec.role is Role.EMBEDDING and not scheme.is_coarse):
                yield spec, quantize(weight, scheme)
            elif spec.role is Role.EMBEDDING:
                yield spec, quantize_table(weight, scheme, hessian)
            elif spec.role.is_expert and moments is not None and is_scarce(moments.tokens, weight):
                writer.scarce(spec, moments.tokens)
                yield spec, quantize(weight, scheme, "mse", moments.mean_square.to(device))
            else:
                yield spec, gptq(weight, scheme, hessian, damped=partial(writer.damped, spec))
        except ElmExportError as error:
            raise error.of(spec.name) from None
        progress.advance(spec.size)
