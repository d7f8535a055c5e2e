"""Guard of calibrated codes: kept only where they lose no more than plain `mse` on a text that nothing was fitted to.

A calibration text may be too short, or say the same thing over and over; codes that were fitted to it then lose more than codes that were not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from calibration.collect import collect
from calibration.dequantized import Dequantized
from calibration.facts import method_facts, rounded
from calibration.method import Job, Prepared
from calibration.sensitivity import KLEvaluator
from calibration.statistics import Statistics, mean_square_of
from calibration.text import Sample, bundled_sample
from elmexport import __version__
from elmexport.cache import cached_path, keep_document
from elmexport.checkpoint import open_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.documents import decode_json
from elmexport.quantization.weight_source import CheckpointWeights, WeightSource

TOKENS, WINDOW = 1024, 256  # of the text that judges


@dataclass(frozen=True)
class Losses:
    """KL (nats per token, weights only) of the codes that a method found, and of those that `mse` finds, on the bundled held-out text."""

    found: float
    mse: float


def held_out_sample(checkpoint: Checkpoint) -> Sample:
    """Sample the text that no codes are fitted to and no choice is made on."""
    window = min(WINDOW, checkpoint.config.dims.context)
    return bundled_sample(open_tokenizer(checkpoint), checkpoint.config, "held-out", tokens=TOKENS, window=window)


def held_out_loss(checkpoint: Checkpoint, weights: WeightSource) -> dict[str, Any]:
    """Measure the KL (nats per token) of `weights` on the held-out text, described for the manifest."""
    sample = held_out_sample(checkpoint)
    return _described(sample, KLEvaluator(checkpoint, sample).divergence(Dequantized(weights)))


def not_worse_than_mse(job: Job, prepared: Prepared) -> Prepared:
    """Compare codes with those of `mse` on held-out text: the better ones, with a note where these are not those of `prepared`.

    The facts say what was measured (`held_out`). What was measured before is in the cache.

    Raises:
        ElmExportError: the cache cannot be written.
    """
    sample = held_out_sample(job.checkpoint)
    statistics = _weighting(job)
    plain = CheckpointWeights(job.checkpoint, job.plan, "mse", mean_square_of(statistics.moments))
    losses = _known_losses(job, prepared, sample, plain)
    mse = {"mse_kl": rounded(losses.mse)}
    if losses.found <= losses.mse:
        return replace(prepared, facts={**prepared.facts, "held_out": _described(sample, losses.found) | mse})
    method = prepared.facts["method"]
    note = (
        f"--method {method} lost more on text that it had not read than mse loses (KL {losses.found:.4f} against {losses.mse:.4f} nats per token), "
        "so mse's codes were taken; calibrate on more text, of more kinds"
    )
    facts = {**method_facts("mse", statistics), "held_out": _described(sample, losses.mse) | mse}
    return Prepared(plain, statistics, facts, (*prepared.notes, note))


def _weighting(job: Job) -> Statistics:
    """Statistics that weight the errors of `mse` where no others are given: those of every export's own pass, if there is one."""
    if job.short_pass is not None:
        return job.short_pass()
    window = min(WINDOW, job.checkpoint.config.dims.context)
    sample = bundled_sample(open_tokenizer(job.checkpoint), job.checkpoint.config, "weighting", tokens=window, window=window)
    return collect(job.checkpoint, sample, progress=job.progress)


def _known_losses(job: Job, prepared: Prepared, sample: Sample, plain: WeightSource) -> Losses:
    text = prepared.facts["calibration"]
    if not text or not text["text_sha256"]:  # llama.cpp's importance matrix does not say what it was measured on
        return _measure(job, prepared, sample, plain)
    schemes = {name: scheme.recipe_name for name, scheme in job.plan.schemes.items()}
    hessian = prepared.statistics is not None and prepared.statistics.facts.hessian  # by which some methods judge, and find other codes
    key = [__version__, job.checkpoint.identity(), schemes, prepared.facts["method"], text, hessian, sample.sha256]
    path = cached_path("losses", key, ".json")
    try:
        known = decode_json(path.read_bytes())
        return Losses(float(known["found"]), float(known["mse"]))
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not measured yet, or damaged
    losses = _measure(job, prepared, sample, plain)
    keep_document(path, asdict(losses))
    return losses


def _measure(job: Job, prepared: Prepared, sample: Sample, plain: WeightSource) -> Losses:
    job.progress.stage(f"comparing {prepared.facts['method']} with mse on {sample.tokens:,} tokens", 2)
    evaluator = KLEvaluator(job.checkpoint, sample)
    found = evaluator.divergence(Dequantized(prepared.weights))
    job.progress.advance(1)
    mse = evaluator.divergence(Dequantized(plain))
    job.progress.advance(1)
    return Losses(found, mse)


def _described(sample: Sample, kl: float) -> dict[str, Any]:
    return {"text": sample.words, "tokens": sample.tokens, "kl": rounded(kl)}
