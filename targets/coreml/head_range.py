"""Logits that fp16 cannot hold: found from the weights, before any text is read, and held at the end of fp16's range in the package.

What a head multiplies is the output of an RMS norm, `sqrt(D) * u * g` with `|u| <= 1` and the norm's weight `g`. So no logit exceeds
`sqrt(D) * |g * w|`, with `w` the token's row of the head, whatever the text (Cauchy-Schwarz).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from elmexport.graph.ir import Graph
from elmexport.quantization.weight_source import WeightSource
from elmexport.weights import Role

FP16_MAX = 65504.0
LOGIT_SCALE = "logit_scale"  # attribute of the head's node: a power of two that its input is multiplied by, and its output divided by
_MARGIN = 1.25  # for quantized rows, and for fp16's rounding on the way
_CHUNK = 8192  # rows that are float32 at a time


@dataclass(frozen=True)
class Overflow:
    """Tokens whose logits may leave fp16's range, the one that may go furthest first."""

    tensor: str
    tokens: tuple[int, ...]
    bound: float  # of the first

    def note(self) -> str:
        """Words for the user."""
        more = f" and of {len(self.tokens) - 1} more" if len(self.tokens) > 1 else ""
        return (
            f"the logit of token {self.tokens[0]}{more} (row {self.tokens[0]} of {self.tensor}) may reach {self.bound:.3g}, beyond fp16's 65504, in which "
            "Core ML computes: the package gives 65504 at most. Where the row is not meant to be so large, correct it in the checkpoint; a format "
            "that computes in float32 (`elmexport gguf`) gives the logit as it is"
        )


def guard_head(graph: Graph, weights: WeightSource) -> tuple[Graph, Overflow | None]:
    """Mark the head of `graph` where a logit may leave fp16's range, so that it is computed smaller, cut off, and scaled back."""
    found = _overflow(graph, weights)
    if found is None:
        return graph, None
    scale = 2.0 ** -math.ceil(math.log2(found.bound * _MARGIN / FP16_MAX))
    nodes = (replace(node, attrs=node.attrs | {LOGIT_SCALE: scale}) if node.role is Role.LM_HEAD else node for node in graph.nodes)
    return graph.with_nodes(tuple(nodes)), found


def _overflow(graph: Graph, weights: WeightSource) -> Overflow | None:
    head = next((node for node in graph.nodes if node.role is Role.LM_HEAD), None)
    norm = next((node for node in graph.nodes if head is not None and head.inputs["x"] in node.outputs), None)
    if head is None or norm is None or norm.op != "rms_norm":
        return None
    spec = head.weights["weight"]
    gain = weights.numbers(norm.weights["weight"]).to(torch.float32)
    table = weights.numbers(spec)
    bounds = torch.cat([(rows.to(torch.float32) * gain).norm(dim=1) for rows in torch.split(table, _CHUNK)]) * math.sqrt(len(gain))
    beyond = torch.nonzero(bounds * _MARGIN > FP16_MAX).flatten()
    if not len(beyond):
        return None
    order = beyond[bounds[beyond].argsort(descending=True)]
    return Overflow(spec.name, tuple(order.tolist()), float(bounds[order[0]]))
