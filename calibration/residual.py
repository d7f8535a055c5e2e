"""Residual peak: largest value of the residual stream, and the power of two that keeps it in fp16 (`elmexport.graph.rescale`)."""

from __future__ import annotations

import math

from torch import Tensor

from elmexport.graph.ir import Node

FP16_MAX = 65504.0
# The stream may grow this many times beyond the peak that was measured before fp16 overflows.
HEAD_ROOM = 4.0
# Without a measurement: room for peaks of 2 million, against reports of up to several hundred thousand for the published models.
DEFAULT_ALPHA = 2.0**-5


class ResidualPeak:
    """Observer of a forward pass: the largest magnitude on the residual stream."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self, node: Node, output: Tensor) -> None:
        # What is added counts as well as the sum: an addend can overflow before it is added.
        if node.op == "add" or (node.role is not None and node.role.writes_to_stream):
            low, high = output.aminmax()
            self.value = max(self.value, -float(low), float(high))


def choose_alpha(peak: float) -> float:
    """Choose the residual scale: the largest power of two, at most 1, that keeps `HEAD_ROOM * peak` within fp16."""
    if peak * HEAD_ROOM <= FP16_MAX:
        return 1.0
    return 2.0 ** math.floor(math.log2(FP16_MAX / (HEAD_ROOM * peak)))
