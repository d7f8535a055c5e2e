"""Self-check of an export: KL divergence of the artifact, run by its engine, from the model on a short text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.residual import ResidualPeak
from calibration.statistics import MEAN_SQUARE, Facts, Statistics
from calibration.text import Sample, sample_ids
from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.divergence import Divergence, divergence
from elmexport.errors import ElmExportError, VerificationError
from elmexport.graph.device import torch_device
from elmexport.graph.forward import KVCaches, forward
from elmexport.graph.ir import Graph, Node
from elmexport.progress import Progress
from elmexport.runtimes import open_as
from elmexport.weights import WeightSpec

TOKENS = 128  # read by the reference and the artifact
DECODED = 8  # of these, fed one at a time to cover the decode path


@dataclass(frozen=True)
class ReferenceRun:
    """The model itself on a short text: float32 logits `[tokens, vocab]` for `ids`, and statistics (mean squares, the residual peak)."""

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    statistics: Statistics

    @property
    def text(self) -> str:
        """Description of the ids, in words."""
        return self.statistics.facts.text


class _Observer:
    """Observer of the residual stream and of the inputs of linear layers."""

    def __init__(self, graph: Graph) -> None:
        self.peak = ResidualPeak()
        self.mean_squares: dict[str, torch.Tensor] = {}  # by activation
        self._read = set(graph.linear_inputs.values())

    def __call__(self, node: Node, out: torch.Tensor) -> None:
        self.peak(node, out)
        if node.outputs[0] in self._read:
            self.mean_squares[node.outputs[0]] = out.flatten(0, -2).square().cpu().mean(0, dtype=torch.float64).to(torch.float32)


@torch.inference_mode()
def reference_pass(checkpoint: Checkpoint, graph: Graph, tokenizer: Tokenizer | None, progress: Progress) -> ReferenceRun:
    """Run the checkpoint in float32 on the bundled text, its weights streamed through `graph` one tensor at a time."""
    ids, text = sample_ids(tokenizer, checkpoint.config.dims.vocab_size, min(TOKENS, graph.context))
    observer = _Observer(graph)
    progress.stage("reference pass", sum(spec.size for node in graph.nodes for spec in node.weights.values()))

    def weight(spec: WeightSpec) -> torch.Tensor:
        progress.advance(spec.size)
        return checkpoint.tensor(spec.name)

    caches = KVCaches(graph, context=len(ids), device=torch_device())
    logits = forward(graph, weight, torch.from_numpy(ids)[None], 0, caches, observe=observer)
    if not torch.isfinite(logits).all():
        raise ElmExportError(
            f"{checkpoint.source.name} gives logits that are not finite in float32; the checkpoint is damaged, download it again"
        )
    sample = Sample(ids[None], text)
    facts = Facts(
        model=checkpoint.source.name,
        identity=checkpoint.identity(),
        text=text,
        text_sha256=sample.sha256,
        tokens=sample.tokens,
        window=sample.window,
        hessian=False,
        inputs=graph.linear_inputs,
        residual_peaks=(observer.peak.value,),
        norm_peaks={},
    )
    tensors = {f"{activation}.{MEAN_SQUARE}": square for activation, square in observer.mean_squares.items()}
    return ReferenceRun(ids, logits[0].numpy(), Statistics(facts, tensors))


def self_check(
    target: str, folder: Path, reference: ReferenceRun, limit: float, progress: Progress
) -> tuple[Divergence, NDArray[np.float32]]:
    """Run the artifact in the engine of its target on the reference's ids, most at once and the last few one by one, and compare.

    Returns the divergence, and the artifact's logits `[tokens, vocab]`.

    Raises:
        VerificationError: the mean KL divergence exceeds `limit` (nats per token): the artifact is broken.
        MissingDependencyError: the engine is not installed.
    """
    ids = reference.ids
    prefill = max(1, len(ids) - DECODED)
    progress.stage("self-check", len(ids))
    runtime = open_as(target, folder, check=True)
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
    if not result.kl_mean <= limit:
        raise VerificationError(
            f"self-check failed: KL(model || artifact) is {result.kl_mean:.3g} nats per token over {result.tokens} tokens, {limit:g} is the most this "
            f"quantization may cost; top-1 agreement {result.top1_agreement:.1%}. The artifact was discarded. Choose a wider --quant; if a float format fails too, report it as a bug"
        )
    return result, logits
