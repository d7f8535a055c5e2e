"""GPTQ of a tied embedding: a matrix as the head, a table whose rows are read one at a time as the embedding.

As the head it costs the output error under the Hessian of what it multiplies; as the embedding, an error of a row enters the residual stream in
whatever direction it has. The sum of both is the Hessian with a part of the identity added, which is what damping is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.gptq import gptq
from calibration.second_moments import add_products, mirror
from calibration.text import Sample
from elmexport.checkpoint.base import Checkpoint
from elmexport.graph.device import torch_device
from elmexport.graph.forward import batches, layer_stages, stage_by_stage
from elmexport.models import trace
from elmexport.progress import Progress
from elmexport.quantization.codec import Quantized
from elmexport.quantization.schemes import CodedScheme

# The embedding's part of the sum: between 0.3 and 1 the divergence of `tiny` hardly changes (docs/quantization-results.md).
EMBEDDING_PART = 0.5
TOKENS = 4096  # at most, to measure what the head multiplies


def quantize_table(weight: Tensor, scheme: CodedScheme, hessian: Tensor) -> Quantized:
    """Quantize the tied embedding `weight` `[vocab, dim]` to `scheme`. `hessian` `[dim, dim]` is E[x xᵀ] of what it multiplies as the head.

    Raises:
        ElmExportError: see `gptq`.
    """
    return gptq(weight, scheme, hessian, damping=EMBEDDING_PART)


@torch.inference_mode()
def head_moments(checkpoint: Checkpoint, sample: Sample, progress: Progress) -> Tensor:
    """Measure the Hessian of the head, E[x xᵀ] `[dim, dim]` of its input, on windows of `sample`; float32, on the torch device."""
    count = max(1, min(len(sample.ids), TOKENS // sample.window))
    ids = torch.from_numpy(sample.ids[:: len(sample.ids) // count][:count])
    stages, device = layer_stages(trace(checkpoint.config, sample.window))[:-1], torch_device()
    progress.stage("measuring what the head reads", len(stages))
    x = ids
    for stream in stage_by_stage(stages, lambda spec: checkpoint.tensor(spec.name), ids, device):
        x = stream
        progress.advance(1)
    dim = checkpoint.config.dims.model_dim
    sums = torch.zeros(dim, dim, device=device)
    for rows in batches(*ids.shape):
        add_products(sums, x[rows].flatten(0, 1).to(device))
    return mirror(sums.div_(ids.numel()))
