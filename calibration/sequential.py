"""Sequential GPTQ: along the forward pass, every matrix is fitted to what its quantized predecessors hand it.

Two copies of the calibration text go through the model side by side, one through the weights as published, one through those quantized so
far. A linear layer's Hessian comes from the quantized copy, which is what it will read; and the matrix that is quantized is not W but the
one that, from the quantized copy, gives best what W gives from the exact one (least squares, in the spirit of Qronos, Zhang et al. 2025, and
GPTAQ, Li et al. 2025). Where the output is added to the residual stream, the error that the stream has gathered is part of what is to be
made good. How far either goes, half of the text decides by how it judges what the other half fits (`calibration.held_out`).

The graph is cut before every linear layer. Between two cuts live only the activations that later nodes read, for the whole text, and the
weights of one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from calibration.experts import Scarce, quantize_experts
from calibration.gptq import gptq
from calibration.held_out import DEFAULT_PART, Half, choose_damping, fit, mean_of
from calibration.second_moments import add_products, mirror
from calibration.table import head_moments, quantize_table
from calibration.text import Sample
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.graph.device import product_dtype, torch_device
from elmexport.graph.forward import LoadedStage, Stage, batches, linear_stages
from elmexport.graph.ir import Node
from elmexport.models import trace
from elmexport.progress import Progress
from elmexport.quantization.codec import Quantized
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme
from elmexport.weights import Role, WeightSpec

_COARSE = 4  # bits, beside whose rounding that of a forward pass in bfloat16 does not count

Activations = dict[str, Tensor]  # by the graph's names, float32 [sequences, tokens, width]


@torch.inference_mode()
def quantize_in_order(
    checkpoint: Checkpoint,
    plan: Plan,
    sample: Sample,
    progress: Progress,
    damped: Callable[[WeightSpec, float], None] | None = None,
    scarce: Scarce | None = None,
) -> Iterator[tuple[WeightSpec, Quantized]]:
    """Quantize the tensors of `plan` in forward order; yields each with its codes, which lie on the torch device.

    The embedding, where it is the head too and has 4-bit codes, is quantized for what it multiplies as the head (`calibration.table`); else by `mse`.

    `damped` is told of every matrix whose Hessian needed more damping than usual, before it is yielded, `scarce` of every matrix of an expert
    that too few tokens reach for GPTQ.

    Raises:
        ElmExportError: ids outside the vocabulary, activations that are not finite, or weights that do not fit their scheme.
    """
    if int(sample.ids.max()) >= checkpoint.config.dims.vocab_size:
        raise ElmExportError(
            f"token id {sample.ids.max()} is outside the vocabulary of {checkpoint.source.name}; use the model's tokenizer"
        )
    graph, device = trace(checkpoint.config, sample.window), torch_device()
    products = forward_dtype(checkpoint, plan, device)
    stages = linear_stages(graph)
    chosen: dict[Role, tuple[float, float]] = {}  # damping and ridge of the matrix before of each role
    exact: Activations = {graph.source: torch.from_numpy(sample.ids)}
    rounded = dict(exact)
    progress.stage(f"quantizing along {sample.tokens:,} tokens", sum(_cost(stage) for stage in stages))
    for number, stage in enumerate(stages):
        original = stage.load(lambda spec: checkpoint.tensor(spec.name), device)
        weights, changed = original.weights, dict(original.weights)

        def fit(spec: WeightSpec, scheme: CodedScheme, weight: Tensor, read: Tensor, found: Tensor) -> Quantized:
            """GPTQ of an expert's matrix: its tokens count as sequences of one."""
            of_expert = Node("linear", spec.name, {"x": "x"}, {"weight": spec}, {}, (), spec.layer, spec.role)
            start = chosen.get(spec.role, (DEFAULT_PART, DEFAULT_PART))
            target = _target(of_expert, weight, {"x": read[:, None]}, {"x": found[:, None]}, None, *start)
            chosen[spec.role] = target.damping, target.ridge
            told = None if damped is None else partial(damped, spec)
            return gptq(target.weight, scheme, target.hessian, damping=target.damping, damped=told)

        for node in stage.nodes:
            if node.op == "moe":
                for matrix, codes in quantize_experts(node, weights, plan, exact, rounded, fit, scarce or (lambda spec, tokens: None)):
                    changed[matrix.name] = codes.dequantize()
                    yield matrix, codes
                continue
            spec = node.weights.get("weight", node.weights.get("table"))
            scheme = None if spec is None else plan.schemes[spec.name]
            if spec is None or not isinstance(scheme, CodedScheme) or (node.role is Role.LM_HEAD and checkpoint.config.dims.tied):
                continue  # a tied head has been quantized as the embedding
            try:
                if node.op == "linear":
                    gathered = _gathered(stage, exact, rounded)
                    start = chosen.get(spec.role, (DEFAULT_PART, DEFAULT_PART))
                    target = _target(node, weights[spec.name], exact, rounded, gathered, *start)
                    chosen[spec.role] = target.damping, target.ridge
                    quantized = gptq(
                        target.weight,
                        scheme,
                        target.hessian,
                        damping=target.damping,
                        damped=None if damped is None else partial(damped, spec),
                    )
                elif scheme.is_coarse and checkpoint.config.dims.tied:
                    quantized = quantize_table(weights[spec.name], scheme, head_moments(checkpoint, sample, progress))
                else:
                    quantized = quantize(weights[spec.name], scheme)
            except ElmExportError as error:
                raise error.of(spec.name) from None
            changed[spec.name] = quantized.dequantize()
            yield spec, quantized
        later = {name for rest in stages[number + 1 :] for name in rest.inputs}
        if later:  # nothing reads the logits
            for activations, loaded in ((exact, original), (rounded, replace(original, weights=changed))):
                activations |= _run(loaded, activations, products)
                for name in activations.keys() - later:
                    del activations[name]
        progress.advance(_cost(stage))


def forward_dtype(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> torch.dtype:
    """Dtype in which linear layers multiply: bfloat16's own rounding is small beside that of 4-bit codes, not beside that of 8-bit ones."""
    coded = (plan.schemes[spec.name] for spec in checkpoint.specs.values() if spec.role not in (Role.EMBEDDING, Role.LM_HEAD))
    fine = any(isinstance(scheme, CodedScheme) and scheme.width > _COARSE for scheme in coded)
    return torch.float32 if fine else product_dtype(device)


def _cost(stage: Stage) -> int:
    """Multiplications for each token, about: two forward passes, the products of `_target`."""
    linear = sum(spec.size for node in stage.nodes for spec in node.weights.values() if node.op == "linear")
    experts = sum(
        sum(spec.size for spec in node.weights.values()) * node.attrs["active"] // node.experts for node in stage.nodes if node.experts
    )
    return 4 * (linear + experts) + 1


def _gathered(stage: Stage, exact: Activations, rounded: Activations) -> Callable[[slice], Tensor] | None:
    """The error so far of the stream that the stage's linear layer adds to; None where it adds to none."""
    name = stage.nodes[0].outputs[0]
    for node in stage.nodes[1:]:
        if node.op == "add" and name in node.inputs.values():
            (other,) = (value for value in node.inputs.values() if value != name)
            return lambda rows: exact[other][rows] - rounded[other][rows]
    return None


@dataclass(frozen=True)
class _Target:
    """What to quantize `[out, in]`, the Hessian `[in, in]` of what it will multiply, and the damping and the ridge that suit it."""

    weight: Tensor
    hessian: Tensor
    damping: float
    ridge: float


def _target(
    node: Node,
    weight: Tensor,
    exact: Activations,
    rounded: Activations,
    gathered: Callable[[slice], Tensor] | None,
    damping: float = DEFAULT_PART,
    ridge: float = DEFAULT_PART,
) -> _Target:
    """Fit the matrix that makes good what its inputs lack; searches for the best `damping` and `ridge` begin with these."""
    sequences = len(rounded[node.inputs["x"]])
    middle = sequences // 2
    halves = [_moments(node, weight, exact, rounded, gathered, *part) for part in ((0, middle), (middle, sequences)) if part[1] > part[0]]
    hessian = mean_of([half.hessian for half in halves])
    if hessian.diagonal().mean() == 0:  # the text says nothing of these inputs
        return _Target(weight, hessian, damping, ridge)
    change, ridge = fit(halves, ridge)
    if len(halves) == 2:
        damping = choose_damping(halves[0].hessian, halves[1].hessian, damping)
    return _Target(weight if change is None else weight + change, hessian, damping, ridge)


def _moments(
    node: Node,
    weight: Tensor,
    exact: Activations,
    rounded: Activations,
    gathered: Callable[[slice], Tensor] | None,
    start: int,
    stop: int,
) -> Half:
    """Second moments over the sequences from `start` up to `stop`."""
    before, now = exact[node.inputs["x"]], rounded[node.inputs["x"]]
    (out, width), device = weight.shape, weight.device
    dtype = product_dtype(device)  # of the products that hold a difference: it is small beside what it is added to
    hessian = torch.zeros(width, width, device=device)
    missing = torch.zeros(out, width, device=device)  # E[what the output still lacks × what it is made from]
    # The part that the weight makes is W E[(before - x) xᵀ]: `narrow` says that this costs less than the products of its outputs.
    narrow = width < (2 * out if gathered is None else out)
    drift = torch.zeros(width, width, device=device) if narrow else None
    maker = weight if narrow else weight.to(dtype)
    for batch in batches(stop - start, now.shape[1]):
        rows = slice(start + batch.start, start + batch.stop)
        x = now[rows].flatten(0, 1).to(device)
        difference = before[rows].flatten(0, 1).to(device) - x
        lacking = None if gathered is None else gathered(rows).flatten(0, 1).to(device)
        add_products(hessian, x)
        x, difference = x.to(dtype), difference.to(dtype)
        if drift is not None:
            drift += difference.T @ x
        else:
            made = torch.nn.functional.linear(difference, maker)
            lacking = made if lacking is None else lacking + made
        if lacking is not None:
            missing += lacking.to(dtype).T @ x
    if drift is not None:
        missing.addmm_(weight, drift)
    tokens = (stop - start) * now.shape[1]
    half = Half(mirror(hessian.div_(tokens)), missing / tokens)
    if not (torch.isfinite(half.hessian).all() and torch.isfinite(half.missing).all()):
        raise ElmExportError("the activations are not finite in float32; the checkpoint is damaged, download it again")
    return half


def _run(loaded: LoadedStage, activations: Activations, products: torch.dtype) -> Activations:
    """Run a stage over the whole text, its linear layers multiplying in the dtype `products`; returns its outputs."""
    found: Activations = {}
    sequences, tokens = activations[loaded.stage.inputs[0]].shape[:2]
    for rows in batches(sequences, tokens):
        for name, out in loaded.run({name: activations[name][rows] for name in loaded.stage.inputs}, products=products).items():
            if name not in found:
                found[name] = torch.empty(sequences, *out.shape[1:])
            found[name][rows] = out
    return found
