"""RMSNorm in fp16 without overflow, whatever the size of its input."""

from __future__ import annotations

import math

import numpy as np
from coremltools.converters.mil.mil import Builder as mb

from elmexport.graph.ir import Node
from targets.coreml.packing import Var, WeightFile

_SMALLEST_NORMAL = 2.0**-14  # hardware may take smaller fp16 numbers for zero
_LEAST_RATIO = 2.0**-5


def rms_norm(x: Var, weight: Var, eps: float, axis: int) -> Var:
    """RMS norm `x / sqrt(mean(x², axis) + eps) * weight`, computed on `y = x / m`, where `m = max(|x|, sqrt(eps))`.

    `y / sqrt(mean(y²) + (sqrt(eps) / m)²)` is the same number for any m. With this one no square exceeds 1, and the mean is at least
    1 / size wherever x is not all below sqrt(eps). After residual rescaling sqrt(eps) may be too small for fp16: m is then held at the
    smallest normal number, and sqrt(eps) at 1/32 of that, which changes only inputs that fp16 does not represent either; an all-zero input
    gives zeros, never 0/0.
    """
    root = math.sqrt(eps)
    floor = max(root, _SMALLEST_NORMAL)
    largest = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=[axis], keep_dims=True), y=np.float16(floor))
    y = mb.real_div(x=x, y=largest)
    mean = mb.reduce_mean(x=mb.mul(x=y, y=y), axes=[axis], keep_dims=True)
    small = mb.real_div(x=np.float16(floor), y=largest)
    if root < floor:
        small = mb.mul(x=small, y=np.float16(max(root / floor, _LEAST_RATIO)))
    inverse = mb.rsqrt(x=mb.add(x=mean, y=mb.mul(x=small, y=small)))
    return mb.mul(x=mb.mul(x=y, y=inverse), y=weight)


def head_norm(x: Var, node: Node, which: str, file: WeightFile) -> Var:
    """RMS norm `which` ("q_norm", "k_norm") of the heads `x` `[1, heads, tokens, head_dim]`, where the attention `node` has one."""
    spec = node.weights.get(which)
    return x if spec is None else rms_norm(x, file.vector(spec, (1, 1, 1, spec.size)), node.attrs["eps"], axis=3)
