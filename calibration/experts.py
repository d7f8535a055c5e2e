"""GPTQ of a mixture of experts: each matrix of each expert by the tokens that go to that expert.

An expert that too few tokens reach has a Hessian that says little: with fewer tokens than inputs it is singular, and what it does not say would be
made up by damping. Such a matrix is rounded by least squares instead, weighted by what it did read, and the caller told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.graph.ir import Node
from elmexport.graph.ops import route
from elmexport.quantization.codec import Quantized
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme
from elmexport.weights import WeightSpec

Scarce = Callable[[WeightSpec, int], None]
"""Called with a matrix that too few tokens reached, and how many did."""
Fit = Callable[[WeightSpec, CodedScheme, Tensor, Tensor, Tensor], Quantized]
"""Finds the codes of a matrix `[out, in]` of what it reads, float32 `[tokens, in]`: by the weights as published, and by those quantized so far."""


def is_scarce(tokens: int, weight: Tensor) -> bool:
    """Whether `tokens` positions are too few for the Hessian of `weight` `[out, in]`: fewer than it has inputs."""
    return tokens < weight.shape[1]


def quantize_experts(
    node: Node,
    weights: Mapping[str, Tensor],
    plan: Plan,
    exact: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    fit: Fit,
    scarce: Scarce,
) -> Iterator[tuple[WeightSpec, Quantized]]:
    """Quantize the matrices of a `moe` node, expert by expert, each down projection by what the quantized gate and up hand it.

    Tokens go where the quantized predecessors send them. `exact` and `rounded` are the activations, float32 `[sequences, tokens, width]`.
    """
    device = next(iter(weights.values())).device
    before, now = (values[node.inputs["x"]].flatten(0, 1) for values in (exact, rounded))
    _, chosen = route(rounded[node.inputs["logits"]].flatten(0, 1), node.attrs["active"])

    def one(spec: WeightSpec, read: Tensor, found: Tensor) -> Quantized | None:
        scheme, weight = plan.schemes[spec.name], weights[spec.name]
        if not isinstance(scheme, CodedScheme):
            return None
        try:
            if not is_scarce(len(found), weight):
                return fit(spec, scheme, weight, read, found)
            scarce(spec, len(found))
            return quantize(weight, scheme, "mse", found.square().mean(0) if len(found) else None)
        except ElmExportError as error:
            raise error.of(spec.name) from None

    for expert in range(node.experts):
        tokens = (chosen == expert).any(-1).nonzero().flatten()
        read, found = before[tokens].to(device), now[tokens].to(device)
        gate, up, down = (node.weights[f"{part}.{expert}"] for part in ("gate", "up", "down"))
        values = {spec.name: weights[spec.name] for spec in (gate, up)}
        for spec in (gate, up):
            quantized = one(spec, read, found)
            if quantized is not None:
                values[spec.name] = quantized.dequantize()
                yield spec, quantized
        hidden = [_swiglu(x, *pair) for x, pair in ((read, (weights[gate.name], weights[up.name])), (found, tuple(values.values())))]
        quantized = one(down, *hidden)
        if quantized is not None:
            yield down, quantized


def _swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(torch.nn.functional.linear(x, gate)) * torch.nn.functional.linear(x, up)
