"""Distillation: scales, table entries and norms of a quantized model are trained on KL(model || quantized model); codes stay.

The gradient of the divergence of the logits (on the calibration text, averaged over its tokens) reaches every matrix by backpropagation
through the quantized model; that of a scale is the sum over its group of codes times gradients. Adam changes each parameter by parts of its
own size. Windows that are trained on are not those that judge: every eighth is held out, and what counts is the best state that they have
seen, which may be the first. mlx-lm's DWQ trains the same parameters.

Layers run one after another with one layer's activations in memory; what a layer computed is computed again on the way back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.text import Sample
from elmexport.checkpoint.base import Checkpoint
from elmexport.graph.device import product_dtype, torch_device
from elmexport.graph.forward import LoadedStage, Stage, batches, layer_stages, stage_by_stage
from elmexport.models import trace
from elmexport.progress import Progress
from elmexport.quantization.codec import Quantized
from elmexport.quantization.weight_source import WeightSource
from elmexport.weights import WeightSpec

EPOCHS = 2
RATE = 5e-4  # of Adam's first step, as a part of a parameter's size; falls to zero along a line
HELD_OUT = 8  # one window in so many
PATIENCE = 3  # measurements without a better one, after which training ends
_MEASUREMENTS = 3  # of the held-out windows in an epoch
_LOGIT_TOKENS = 512  # whose logits are in memory at once
_FIRST, _SECOND = 0.9, 0.95  # decay of Adam's moments


@dataclass(frozen=True)
class Distilled:
    """Result of `distill`: what has changed, and the mean KL (nats per token) on the held-out windows before and after."""

    tensors: Mapping[str, Quantized]
    norms: Mapping[str, Tensor]  # float32, numbers of fp16
    before: float
    after: float
    steps: int


def split(sample: Sample) -> tuple[Sample, Sample]:
    """Split a sample into windows to train on and windows held out."""
    held = [row % HELD_OUT == HELD_OUT // 2 for row in range(len(sample.ids))]
    return Sample(sample.ids[[not out for out in held]], sample.words), Sample(sample.ids[held], sample.words)


def distill(checkpoint: Checkpoint, weights: WeightSource, train: Sample, held: Sample, progress: Progress) -> Distilled:
    """Train the parameters of the quantized `weights` of `checkpoint` on the windows `train`; `held` says which state was best."""
    student = _Student(checkpoint, weights)
    with torch.no_grad():
        trained_on, judged_on = (_Text(student, sample) for sample in (train, held))
        before = best = student.divergence(judged_on)
    kept, waited, step = student.state(), 0, 0
    order = [rows for _ in range(EPOCHS) for rows in _shuffled(len(train.ids), train.window)]
    every = max(1, len(order) // (EPOCHS * _MEASUREMENTS))
    progress.stage(f"distilling on {train.tokens:,} tokens", len(order))
    for step, rows in enumerate(order, 1):
        student.learn(trained_on, rows, RATE * (1 - (step - 1) / len(order)))
        progress.advance(1)
        if step % every == 0 or step == len(order):
            with torch.no_grad():
                found = student.divergence(judged_on)
            if found < best:
                best, kept, waited = found, student.state(), 0
            else:
                waited += 1
            if waited == PATIENCE:
                break
    student.restore(kept)
    return Distilled(student.tensors(), student.norms(), before, best, step)


class _Text:
    """Windows, and what the head of the exact model reads on them: float32 `[windows, tokens, dim]`."""

    def __init__(self, student: _Student, sample: Sample) -> None:
        self.ids = torch.from_numpy(sample.ids)
        stages = student.stages(sample.window)[:-1]
        self.hidden = _last(stage_by_stage(stages, student.exact, self.ids, student.device))


class _Adam:
    """Adam for tensors of any kind, by name; steps are parts of each tensor's `unit`."""

    def __init__(self) -> None:
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps = 0

    def begin(self) -> None:
        """Begin the next step."""
        self._steps += 1

    def apply(self, name: str, parameters: Tensor, unit: Tensor, gradient: Tensor, rate: float) -> None:
        """Change `parameters` in place."""
        gradient = gradient * unit
        first, second = self._moments.setdefault(name, (torch.zeros_like(parameters), torch.zeros_like(parameters)))
        first.lerp_(gradient, 1 - _FIRST)
        second.lerp_(gradient.square(), 1 - _SECOND)
        size = (second / (1 - _SECOND**self._steps)).sqrt_()
        direction = torch.where(size > 0, first / (1 - _FIRST**self._steps) / size, 0.0)
        parameters -= rate * unit * direction


class _Student:
    """The quantized model: codes, and parameters in float32 that are rounded as they are stored whenever they are used."""

    def __init__(self, checkpoint: Checkpoint, weights: WeightSource) -> None:
        self.device, self._checkpoint = torch_device(), checkpoint
        self._codes: dict[str, Quantized] = {}
        self._others: dict[str, Quantized | Tensor] = {}  # what is quantized and not trained, or stored as numbers
        self._parameters: dict[str, Tensor] = {}
        for name, spec in checkpoint.specs.items():
            weight = weights.get(spec)
            if spec.role.is_norm:
                self._parameters[name] = weights.numbers(spec).to(torch.float32).clone()
            elif isinstance(weight, Quantized) and weight.parameters is not None and weight.scheme.is_coarse:
                self._codes[name] = weight
                self._parameters[name] = weight.parameters.to(torch.float32)
            else:
                self._others[name] = weight
        # What a step is a part of: the root mean square of the parameters that belong together, a row's scales or a table.
        self._units = {name: value.square().mean(-1, keepdim=True).sqrt().expand_as(value) for name, value in self._parameters.items()}
        self._adam = _Adam()
        self._products = product_dtype(self.device)

    def stages(self, window: int) -> list[Stage]:
        return layer_stages(trace(self._checkpoint.config, window))

    def exact(self, spec: WeightSpec) -> Tensor:
        """The model's own weight."""
        return self._checkpoint.tensor(spec.name)

    def value(self, spec: WeightSpec) -> Tensor:
        """The weight as it would be stored now, float32."""
        if spec.name in self._codes:
            return self._codes[spec.name].with_parameters(self._parameters[spec.name]).dequantize()
        if spec.role.is_norm:
            return self._parameters[spec.name].to(torch.float16).to(torch.float32)
        other = self._others[spec.name]
        return other.dequantize() if isinstance(other, Quantized) else other.to(torch.float32)

    def divergence(self, text: _Text) -> float:
        """Measure the mean KL (nats per token) of the quantized model from the exact one."""
        stages = self.stages(text.ids.shape[1])
        hidden = _last(self._forward(stages[:-1], text.ids))
        total = sum(float(loss) for loss, _ in self._losses(stages[-1], text.hidden, hidden))
        return total / text.ids.numel()

    def learn(self, text: _Text, rows: Tensor, rate: float) -> None:
        """Take one step on the windows `rows`."""
        gradients = self.gradients(text, rows)
        self._adam.begin()
        for name, gradient in gradients.items():
            self._adam.apply(name, self._parameters[name], self._units[name], gradient, rate)

    def gradients(self, text: _Text, rows: Tensor) -> dict[str, Tensor]:
        """Compute the gradient of the mean KL on the windows `rows` by every parameter, float32, on the CPU."""
        stages = self.stages(text.ids.shape[1])
        with torch.no_grad():
            streams = [text.ids[rows], *self._forward(stages[:-1], text.ids[rows])]
        gradients: dict[str, Tensor] = {}
        hidden = streams.pop().requires_grad_()
        for loss, head in self._losses(stages[-1], text.hidden[rows], hidden):
            (loss / rows.numel() / text.ids.shape[1]).backward()  # type: ignore[no-untyped-call]
            self._gather(head, gradients)
        gradient = hidden.grad
        for stage, x in zip(reversed(stages[:-1]), reversed(streams), strict=True):
            assert gradient is not None
            leaves = self._leaves(stage)
            if x.is_floating_point():
                x.requires_grad_()
            elif not any(leaf.requires_grad for leaf in leaves.values()):
                break  # the embedding, which stays as it is
            out = LoadedStage(stage, leaves, self.device)(x, products=self._products)
            torch.autograd.backward(out, gradient)
            self._gather(leaves, gradients)
            gradient = x.grad
        return gradients

    def state(self) -> dict[str, Tensor]:
        """Copy the parameters."""
        return {name: value.clone() for name, value in self._parameters.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._parameters = dict(state)

    def tensors(self) -> dict[str, Quantized]:
        return {name: weight.with_parameters(self._parameters[name]) for name, weight in self._codes.items()}

    def norms(self) -> dict[str, Tensor]:
        return {name: self.value(spec) for name, spec in self._checkpoint.specs.items() if spec.role.is_norm}

    def _forward(self, stages: list[Stage], ids: Tensor) -> Iterator[Tensor]:
        x = ids
        for stage in stages:
            loaded = stage.load(self.value, self.device)
            x = torch.cat([loaded(x[rows], products=self._products) for rows in batches(*x.shape[:2])])
            yield x

    def _losses(self, head: Stage, exact: Tensor, hidden: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The sum of KL over some tokens at a time, and the weights of the head that it was computed with."""
        teacher = head.load(self.exact, self.device)
        leaves = self._leaves(head)
        student = LoadedStage(head, leaves, self.device)
        step = max(1, _LOGIT_TOKENS // exact.shape[1])
        for start in range(0, len(exact), step):
            with torch.no_grad():
                p = teacher(exact[start : start + step], products=self._products).log_softmax(-1)
            q = student(hidden[start : start + step], products=self._products).log_softmax(-1)
            yield torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True), leaves

    def _leaves(self, stage: Stage) -> dict[str, Tensor]:
        """The weights of a stage, those to train as leaves of autograd."""
        found = {spec.name: self.value(spec).to(self.device) for spec in stage.weights()}
        for name, value in found.items():
            value.requires_grad_(torch.is_grad_enabled() and name in self._parameters)
        return found

    def _gather(self, leaves: Mapping[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Add the gradients by the parameters of `leaves` to `gradients`, and drop those by the values."""
        for name, leaf in leaves.items():
            if leaf.grad is None:
                continue
            found = self._codes[name].parameter_gradient(leaf.grad.cpu()) if name in self._codes else leaf.grad.cpu()
            gradients[name] = gradients[name] + found if name in gradients else found
            leaf.grad = None


def _last(streams: Iterable[Tensor]) -> Tensor:
    """The last of `streams`, of which one is in memory at a time."""
    return deque(streams, maxlen=1).pop()


def _shuffled(windows: int, window: int) -> list[Tensor]:
    """Windows of one epoch, in batches."""
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(0))
    return [order[rows] for rows in batches(windows, window)]
