"""Self-check of an export: KL divergence of the artifact, run by its engine, from the model on a short text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.residual import FP16_MAX, ResidualPeak
from calibration.statistics import MEAN_SQUARE, Facts, Statistics
from calibration.text import Sample, sample_ids
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.checkpoint.tokenizer.probes import compare
from elmexport.divergence import Divergence, divergence
from elmexport.errors import ElmExportError, VerificationError
from elmexport.graph.device import torch_device
from elmexport.graph.forward import KVCaches, forward
from elmexport.graph.ir import Graph, Node
from elmexport.progress import Progress
from elmexport.runtimes import open_directly
from elmexport.runtimes.artifact_tokenizer import find_tokenizer
from elmexport.runtimes.base import CHECK_TOKENS
from elmexport.target import Target, wider_formats
from elmexport.weights import Role, WeightSpec

TOKENS = CHECK_TOKENS  # read by the reference and the artifact
DECODED = 4  # of these, fed one at a time to cover the decode path


@dataclass(frozen=True)
class ReferenceRun:
    """The model itself on two short texts: float32 logits `[tokens, vocab]` for `ids`, described by `text`, and statistics of the other.

    Statistics (mean squares, the residual peak) weight the errors of quantization, so what is compared must be another text.
    """

    ids: NDArray[np.int64]
    text: str
    logits: NDArray[np.float32]
    statistics: Statistics
    head: str  # the tensor of the output layer, as the checkpoint's files call it


class _Observer:
    """Observer of the residual stream and of the inputs of linear layers, of the first sequence."""

    def __init__(self, graph: Graph) -> None:
        self.peak = ResidualPeak()
        self.mean_squares: dict[str, torch.Tensor] = {}  # by activation
        self._read = set(graph.linear_inputs.values())

    def __call__(self, node: Node, out: torch.Tensor) -> None:
        self.peak(node, out[:1])
        if node.outputs[0] in self._read:
            self.mean_squares[node.outputs[0]] = out[:1].flatten(0, -2).square().cpu().mean(0, dtype=torch.float64).to(torch.float32)


@torch.inference_mode()
def reference_pass(checkpoint: Checkpoint, graph: Graph, tokenizer: Tokenizer | None, progress: Progress) -> ReferenceRun:
    """Run the checkpoint in float32 on the bundled texts, its weights streamed through `graph` one tensor at a time."""
    vocab_size, count = checkpoint.config.dims.vocab_size, min(TOKENS, graph.context)
    weighting, words = sample_ids(tokenizer, vocab_size, "weighting", count)
    ids, text = sample_ids(tokenizer, vocab_size, "self-check", count)
    observer = _Observer(graph)
    progress.stage("reference pass", sum(spec.size for node in graph.nodes for spec in node.weights.values()))

    def weight(spec: WeightSpec) -> torch.Tensor:
        progress.advance(spec.size)
        return checkpoint.tensor(spec.name)

    caches = KVCaches(graph, batch=2, context=count, device=torch_device())
    both = forward(graph, weight, torch.from_numpy(np.stack((weighting, ids))), 0, caches, observe=observer)
    logits = both[1].clone()  # the other half is given up
    del both
    if not torch.isfinite(logits).all():
        raise ElmExportError(
            f"{checkpoint.source.name} gives logits that are not finite in float32; the checkpoint is damaged, download it again"
        )
    sample = Sample(weighting[None], words)
    facts = Facts(
        model=checkpoint.source.name,
        identity=checkpoint.identity(),
        text=words,
        text_sha256=sample.sha256,
        tokens=sample.tokens,
        window=sample.window,
        hessian=False,
        inputs={name: activation for name, activation in graph.linear_inputs.items() if activation in observer.mean_squares},
        residual_peaks=(observer.peak.value,),
        norm_peaks={},
    )
    tensors = {f"{activation}.{MEAN_SQUARE}": square for activation, square in observer.mean_squares.items()}
    head = next(node.weights["weight"].name for node in graph.nodes if node.role is Role.LM_HEAD)
    return ReferenceRun(ids, text, logits.numpy(), Statistics(facts, tensors), checkpoint.stored_name(head))


def self_check(
    target: Target, folder: Path, reference: ReferenceRun, limit: float, progress: Progress
) -> tuple[Divergence, NDArray[np.float32]]:
    """Run the artifact in the engine of its target on the reference's ids, most at once and the last few one by one, and compare.

    Returns the divergence, and the artifact's logits `[tokens, vocab]`.

    Raises:
        VerificationError: the mean KL divergence exceeds `limit` (nats per token), or logits are not finite: the artifact is broken.
        MissingDependencyError: the engine is not installed.
    """
    ids = reference.ids
    prefill = max(1, len(ids) - DECODED)
    progress.stage("self-check", len(ids))
    runtime = open_directly(target.name, folder, check=True)
    try:
        parts = [runtime.logits(ids[:prefill])]
        progress.advance(prefill)
        for position in range(prefill, len(ids)):
            parts.append(runtime.logits(ids[position : position + 1], position))
            progress.advance(1)
    finally:
        runtime.close()
    logits = np.concatenate(parts)
    result = divergence(reference.logits, logits)
    passed = result.kl_mean <= limit  # never where a logit is not finite
    overflow = None if passed else _overflow(reference, logits)
    if overflow is not None:
        raise VerificationError(f"self-check failed: {overflow}. The artifact was discarded: {wider_formats(target)}")
    if not passed:
        raise VerificationError(
            f"self-check failed: KL(model || artifact) is {result.kl_mean:.3g} nats per token over {result.tokens} tokens, {limit:g} is the most this "
            f"quantization may cost; top-1 agreement {result.top1_agreement:.1%}. The artifact was discarded. Choose a wider --quant; if a float format fails too, report it as a bug"
        )
    return result, logits


def check_texts(target: str, folder: Path, tokenizer: Tokenizer, *, plain: bool) -> None:
    """Compare the ids that the artifact's own tokenizer gives to texts with those of `tokenizer`; `plain`: see `compare`.

    Raises:
        ElmExportError: other ids.
        MissingDependencyError: what reads the artifact's tokenizer is not installed.
    """
    found = find_tokenizer(target, folder)
    if found is not None:
        compare(tokenizer, found, f"the {target} artifact", ties=True, plain=plain)


def _overflow(reference: ReferenceRun, logits: NDArray[np.float32]) -> str | None:
    """What of the artifact's `logits` fp16 could not hold, as a clause; None where it could hold all."""
    # Compared with what fp16 holds: a format that computes in float32 gives such logits as they are.
    lost = (np.abs(reference.logits) > FP16_MAX) & ~(np.abs(logits) > FP16_MAX) | ~np.isfinite(logits)
    tokens = np.flatnonzero(lost.any(axis=0))
    if not len(tokens):
        return None
    largest = np.abs(reference.logits).max(axis=0)
    token = int(tokens[largest[tokens].argmax()])
    more = f" (and of {len(tokens) - 1} more)" if len(tokens) > 1 else ""
    if largest[token] > FP16_MAX:
        return f"the logit of token {token}{more} reaches {largest[token]:.3g}, beyond fp16's 65504: row {token} of {reference.head} is too large"
    return f"the artifact's logit of token {token}{more} is not finite, where the model's is at most {largest[token]:.3g}: its numbers overflow fp16"
