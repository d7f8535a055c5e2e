"""Estimates of the time that GPTQ will take, from the sizes of the matrices and how fast this machine multiplies."""

from __future__ import annotations

import time

import torch

from calibration.sequential import forward_dtype
from elmexport.checkpoint.base import Checkpoint
from elmexport.graph.device import torch_device
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme

TOKENS = (32768, 8192, 2048)  # of the calibration text, that a choice may take: the more, the better the codes
MINUTES = 10.0  # that it may take where nobody says

# Multiplications of each part of the work in the place of one of its own sizes, fitted to benchmarks/gptq_time.py: the parts differ in how
# well they use the processor, and GPTQ's rounding and search for ridge and damping go over a matrix several times.
_FORWARD, _PRODUCTS, _SOLVING, _ROUNDING = 0.6, 1.3, 6.2, 11.0
_FLOAT32 = 2.0  # times as long as in bfloat16, in which the forward passes of those benchmarks multiplied


def gptq_seconds(checkpoint: Checkpoint, plan: Plan, tokens: int, rate: float) -> float:
    """Estimate the seconds of GPTQ along `tokens` tokens where float32 matrices multiply at `rate` operations a second."""
    work, forward = 0.0, _FORWARD
    if forward_dtype(checkpoint, plan, torch_device()) == torch.float32:
        forward *= _FLOAT32
    for name, spec in checkpoint.specs.items():
        if spec.role.is_norm or spec.layer is None:
            continue
        rows, columns = spec.shape
        layer = checkpoint.config.dims.layers[spec.layer]
        read = tokens * layer.active_experts / layer.experts if spec.role.is_expert else tokens  # of the experts, a token goes to some
        work += forward * 2 * rows * columns * 2 * read  # as published, and as quantized so far
        if isinstance(plan.schemes[name], CodedScheme):
            work += _PRODUCTS * (columns**2 + 2 * min(rows, columns) * columns) * read
            work += _SOLVING * columns**3 + _ROUNDING * columns**2 * rows
    return work / rate


def gemm_rate() -> float:
    """Measure the operations a second of a float32 matrix product: the best of a few, which take a tenth of a second or so."""
    size, device = 1024, torch_device()
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a device that works asynchronously
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
