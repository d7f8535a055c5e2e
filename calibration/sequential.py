"""Quantization along the forward pass: every matrix is fitted to what its quantized predecessors hand it.

Two copies of the calibration text go through the model side by side, one through the weights as published, one through those quantized so
far. A linear layer's Hessian comes from the quantized copy, which is what it will read; and the matrix that is quantized is not W but the
one that, from the quantized copy, gives best what W gives from the exact one (least squares, in the spirit of Qronos, Zhang et al. 2025, and
GPTAQ, Li et al. 2025). Where the output is added to the residual stream, the error that the stream has gathered is part of what is to be
made good.

The graph is cut before every linear layer. Between two cuts live only the activations that later nodes read, for the whole text, and the
weights of one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from calibration.gptq import gptq
from calibration.second_moments import add_products, mirror
from calibration.table import head_moments, is_searched, quantize_table
from calibration.text import Sample
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.graph.interpret import run_nodes
from elmexport.graph.ir import Graph, Node
from elmexport.models import trace
from elmexport.progress import Progress
from elmexport.quantization.quantize import PalettizedTensor, QuantizedTensor, quantize
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import Integer, Lut
from elmexport.weights import Role, WeightSpec

BATCH_TOKENS = 2048  # run at once, as in `calibration.collect`
# Added to the diagonal of the least-squares problem, as a part of its mean: targets follow what the text shows clearly, not its noise.
RIDGE = 0.01

Quantized = QuantizedTensor | PalettizedTensor
Activations = dict[str, Tensor]  # by the graph's names, float32 [sequences, tokens, width]


@dataclass(frozen=True)
class _Piece:
    """Consecutive nodes, of which at most the first is a linear layer."""

    nodes: tuple[Node, ...]
    inputs: frozenset[str]  # activations from before that it reads
    outputs: frozenset[str]  # activations of its own that later pieces read

    @property
    def linear(self) -> Node | None:
        return self.nodes[0] if self.nodes[0].op == "linear" else None


@torch.inference_mode()
def quantize_in_order(
    checkpoint: Checkpoint, plan: Plan, sample: Sample, progress: Progress, damped: Callable[[WeightSpec, float], None] | None = None
) -> Iterator[tuple[WeightSpec, Quantized]]:
    """Yield every tensor that `plan` quantizes with its codes, in forward order.

    The embedding, where it is the head too and has 4-bit codes, is quantized for what it multiplies as the head (`calibration.table`); else by `mse`.

    `damped` is told of every matrix whose Hessian needed more damping than usual, before it is yielded.

    Raises:
        ElmExportError: ids outside the vocabulary, activations that are not finite, or weights that do not fit their scheme.
    """
    if int(sample.ids.max()) >= checkpoint.config.dims.vocab_size:
        raise ElmExportError(
            f"token id {sample.ids.max()} is outside the vocabulary of {checkpoint.source.name}; use the model's tokenizer"
        )
    graph = trace(checkpoint.config, sample.window)
    pieces = _cut(graph)
    ids = torch.from_numpy(sample.ids)
    exact: Activations = {"ids": ids}
    rounded: Activations = {"ids": ids}
    progress.stage(f"quantizing along {sample.tokens:,} tokens", sum(_cost(piece) for piece in pieces))
    for number, piece in enumerate(pieces):
        weights = {spec.name: checkpoint.tensor(spec.name).to(torch.float32) for node in piece.nodes for spec in node.weights.values()}
        changed = dict(weights)
        for node in piece.nodes:
            spec = node.weights.get("weight", node.weights.get("table"))
            scheme = None if spec is None else plan.schemes[spec.name]
            if spec is None or not isinstance(scheme, Integer | Lut) or (node.op == "linear" and spec.role is Role.EMBEDDING):
                continue  # a tied head has been quantized as the embedding
            try:
                if node.op == "linear":
                    target, hessian = _target(node, weights[spec.name], exact, rounded, _gathered(piece, exact, rounded))
                    quantized = gptq(target, scheme, hessian, damped=None if damped is None else partial(damped, spec))
                elif is_searched(scheme) and checkpoint.config.dims.tied:
                    quantized = quantize_table(weights[spec.name], scheme, head_moments(checkpoint, sample, progress))
                else:
                    quantized = quantize(weights[spec.name], scheme)
            except ElmExportError as error:
                raise ElmExportError(f"{spec.name}: {error}") from None
            changed[spec.name] = quantized.dequantize()
            yield spec, quantized
        for activations, used in ((exact, weights), (rounded, changed)):
            _run(graph, piece, activations, used)
            later = {name for rest in pieces[number + 1 :] for name in rest.inputs}
            for name in [name for name in activations if name not in later]:
                del activations[name]
        progress.advance(_cost(piece))


def _cut(graph: Graph) -> list[_Piece]:
    groups: list[list[Node]] = [[]]
    for node in graph.nodes:
        if node.op == "linear":
            groups.append([])
        groups[-1].append(node)
    pieces = []
    for number, nodes in enumerate(groups):
        made = {node.outputs[0] for node in nodes}
        read = {name for node in nodes for name in node.inputs.values() if "_cache." not in name and name != "position"}
        later = {name for rest in groups[number + 1 :] for node in rest for name in node.inputs.values()}
        pieces.append(_Piece(tuple(nodes), frozenset(read - made), frozenset(made & later)))
    return pieces


def _cost(piece: _Piece) -> int:
    """Multiplications for each token, about: two forward passes, the products of `_target`."""
    return 4 * sum(spec.size for node in piece.nodes for spec in node.weights.values() if node.op == "linear") + 1


def _gathered(piece: _Piece, exact: Activations, rounded: Activations) -> Callable[[slice], Tensor] | None:
    """The error so far of the stream that the piece's linear layer adds to; None where it adds to none."""
    name = piece.nodes[0].outputs[0]
    for node in piece.nodes[1:]:
        if node.op == "add" and name in node.inputs.values():
            (other,) = (value for value in node.inputs.values() if value != name)
            return lambda rows: exact[other][rows] - rounded[other][rows]
    return None


def _target(
    node: Node, weight: Tensor, exact: Activations, rounded: Activations, gathered: Callable[[slice], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The matrix to quantize `[out, in]`, and the Hessian `[in, in]` of what it will multiply."""
    before, now = exact[node.inputs["x"]], rounded[node.inputs["x"]]
    out, width = weight.shape
    hessian = torch.zeros(width, width)
    missing = torch.zeros(out, width)  # E[what the output still lacks × what it is made from]
    # The part that the weight makes is W E[(before - x) xᵀ]: `narrow` says that this costs less than the products of its outputs.
    narrow = width < (2 * out if gathered is None else out)
    drift = torch.zeros(width, width) if narrow else None
    for rows in _batches(now):
        x = now[rows].flatten(0, 1)
        difference = before[rows].flatten(0, 1) - x
        lacking = None if gathered is None else gathered(rows).flatten(0, 1)
        add_products(hessian, x)
        if drift is not None:
            drift.addmm_(difference.T, x)
        else:
            made = torch.nn.functional.linear(difference, weight)
            lacking = made if lacking is None else made.add_(lacking)
        if lacking is not None:
            missing.addmm_(lacking.T, x)
    if drift is not None:
        missing.addmm_(weight, drift)
    tokens = now.shape[0] * now.shape[1]
    hessian = mirror(hessian.div_(tokens))
    missing /= tokens
    if not (torch.isfinite(hessian).all() and torch.isfinite(missing).all()):
        raise ElmExportError("the activations are not finite in float32; the checkpoint is damaged, download it again")
    return weight + _solve(hessian, missing), hessian


def _solve(hessian: Tensor, missing: Tensor) -> Tensor:
    """The matrix C `[out, in]` that gives `missing` of inputs with `hessian`, in the sense of ridge regression: C (H + λ) = `missing`."""
    mean = hessian.diagonal().mean()
    if mean == 0:  # the text says nothing of these inputs
        return torch.zeros_like(missing)
    damped = hessian + RIDGE * mean * torch.eye(len(hessian))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # more accurate, twice as slow
        factor = torch.linalg.cholesky(damped.to(torch.float64)).to(torch.float32)
    return torch.cholesky_solve(missing.T, factor).T


def _run(graph: Graph, piece: _Piece, activations: Activations, weights: dict[str, Tensor]) -> None:
    """Run `piece` over the whole text; its outputs join `activations`."""
    if not piece.outputs:
        return
    dims = graph.dims
    first = activations[next(iter(piece.inputs))]
    made: Activations = {}
    for rows in _batches(first):
        sequences, tokens = first[rows].shape[:2]

        def caches(layer: int, sequences: int = sequences, tokens: int = tokens) -> tuple[Tensor, Tensor]:
            shape = (sequences, dims.layers[layer].kv_heads, tokens, dims.head_dim)
            return torch.empty(shape), torch.empty(shape)

        def keep(node: Node, out: Tensor, rows: slice = rows) -> None:
            name = node.outputs[0]
            if name in piece.outputs:
                if name not in made:
                    made[name] = torch.empty(len(first), *out.shape[1:])
                made[name][rows] = out

        values = {name: activations[name][rows] for name in piece.inputs}
        run_nodes(piece.nodes, values, lambda spec: weights[spec.name], caches, 0, result=piece.nodes[-1].outputs[0], observe=keep)
    activations |= made


def _batches(x: Tensor) -> Iterator[slice]:
    """Slices of the sequences of `x` `[sequences, tokens, …]`."""
    step = max(1, BATCH_TOKENS // x.shape[1])
    return (slice(start, start + step) for start in range(0, len(x), step))
