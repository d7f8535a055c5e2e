"""Text pass: perplexity, and KL divergence of an artifact's next-token distributions from a reference's on the same tokens."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from elmexport.divergence import token_divergence, token_nll
from elmexport.evaluation.distributions import ReferencePass, window_logits
from elmexport.evaluation.results import Blocks, DepthBucket, KlSummary, PerplexitySummary, TextResult
from elmexport.evaluation.statistics import bootstrap_interval
from elmexport.evaluation.windows import Windows
from elmexport.progress import Progress
from elmexport.runtimes.base import Runtime

BLOCK = 32  # tokens resampled together, at least: neighbours in a text are not independent
MAX_BLOCKS = 512
BUCKETS = 8  # of depth in the window
_MAX_EXPONENT = 690.0  # exp of more is near the end of float64; such a model is broken in any case

Floats = NDArray[np.float64]


def text_pass(runtime: Runtime, windows: Windows, reference: ReferencePass | None, progress: Progress) -> TextResult:
    """Read `windows` with the artifact in `runtime` and, one window at a time, compare with `reference`.

    Raises:
        VerificationError: the artifact gives logits that are not finite.
        ElmExportError: ids outside the vocabulary, windows longer than the context, or see `ReferencePass.windows`.
    """
    distributions = None if reference is None else reference.windows(windows, runtime.vocab_size, progress)
    shape = (len(windows.ids), windows.length - 1)
    nll, reference_nll, kl, agree = (np.zeros(shape) for _ in range(4))
    progress.stage("text pass", windows.ids.size)
    for row, ids in enumerate(windows.ids):
        logits = window_logits(runtime, ids)
        nll[row] = token_nll(logits, ids[1:])
        if distributions is not None:
            other = next(distributions)
            kl[row] = token_divergence(other.log_probs, logits)
            agree[row] = logits.argmax(axis=-1) == other.top
            reference_nll[row] = other.nll
        progress.advance(len(ids))
    if reference is None:
        return TextResult(_perplexity(windows, nll, None), None, _blocks(windows, nll, None, None))
    return TextResult(_perplexity(windows, nll, reference_nll), _kl(windows, kl, agree), _blocks(windows, nll, reference_nll, kl))


def block_starts(windows: Windows) -> list[int]:
    """Starts of the blocks in the counted part of a window."""
    counted = windows.length - 1 - windows.first
    size = min(counted, max(BLOCK, math.ceil(windows.counted / MAX_BLOCKS)))
    return list(range(0, counted, size))


def _block_sums(windows: Windows, figures: Floats) -> Floats:
    """Sums of `figures` `[windows, window - 1]` over the blocks of the counted part."""
    return np.add.reduceat(figures[:, windows.first :], block_starts(windows), axis=1).reshape(-1)


def _blocks(windows: Windows, nll: Floats, reference_nll: Floats | None, kl: Floats | None) -> Blocks:
    sizes = _block_sums(windows, np.ones_like(nll))
    others = [None if figures is None else tuple(_block_sums(windows, figures).tolist()) for figures in (reference_nll, kl)]
    return Blocks(windows.hash, tuple(int(size) for size in sizes), tuple(_block_sums(windows, nll).tolist()), others[0], others[1])


def _perplexity(windows: Windows, nll: Floats, reference: Floats | None) -> PerplexitySummary:
    mean = float(nll[:, windows.first :].mean())
    if reference is None:
        return PerplexitySummary(bounded_exp(mean), None, None, None, windows.counted, windows.text)
    reference_mean = float(reference[:, windows.first :].mean())
    low, high = bootstrap_interval(_block_sums(windows, nll - reference), _block_sums(windows, np.ones_like(nll)))
    return PerplexitySummary(
        value=bounded_exp(mean),
        reference=bounded_exp(reference_mean),
        ratio=bounded_exp(mean - reference_mean),
        ratio_ci=(bounded_exp(low), bounded_exp(high)),
        tokens=windows.counted,
        text=windows.text,
    )


def _kl(windows: Windows, kl: Floats, agree: Floats) -> KlSummary:
    counted = kl[:, windows.first :]
    edges = np.unique(np.linspace(0, windows.length - 1, BUCKETS + 1).round().astype(int))
    buckets = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = kl[:, start:end]
        buckets.append(DepthBucket(start, end, float(part.mean()), float(np.quantile(part, 0.99)), part.size))
    return KlSummary(
        mean=float(counted.mean()),
        mean_ci=bootstrap_interval(_block_sums(windows, kl), _block_sums(windows, np.ones_like(kl))),
        median=float(np.median(counted)),
        p99=float(np.quantile(counted, 0.99)),
        max=float(counted.max()),
        top1_agreement=float(agree[:, windows.first :].mean()),
        tokens=windows.counted,
        text=windows.text,
        by_depth=tuple(buckets),
    )


def bounded_exp(x: float) -> float:
    """exp(x), at most 1e299: a document holds finite numbers only."""
    return math.exp(min(x, _MAX_EXPONENT))
