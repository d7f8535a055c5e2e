"""Collection of statistics: one pass over the calibration text, which observes inputs of linear layers and the residual stream.

One layer's weights are in memory at a time. Sums of squares and magnitudes add up in float64, one batch after the other; second moments
(Hessians) in float32, each batch being one symmetric product, so that an entry's relative error stays near float32's own.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.residual import ResidualPeak
from calibration.second_moments import add_products, mirror
from calibration.statistics import HESSIAN, MEAN_ABS, MEAN_SQUARE, ROUTED, TOKEN_COUNTS, Facts, Statistics
from calibration.text import Sample
from calibration.work import MemoryWork, StageResult, Work
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.graph import ir
from elmexport.graph.device import torch_device
from elmexport.graph.forward import Stage, batches, layer_stages
from elmexport.graph.ir import Graph, Node
from elmexport.models import trace
from elmexport.progress import Progress, SilentProgress


@torch.no_grad()
def collect(
    checkpoint: Checkpoint, sample: Sample, *, hessian: bool = False, work: Work | None = None, progress: Progress | None = None
) -> Statistics:
    """Measure the statistics of `checkpoint` on `sample`, in float32; Hessians too if asked for.

    `work` keeps what is between two layers, and every layer's results; memory where None. What it holds already, from a run that was
    interrupted, is not computed again, and the outcome is the same to the last bit (on the same device, with as many threads).

    Raises:
        ElmExportError: windows longer than the model takes, ids outside the vocabulary, or activations that are not finite.
    """
    progress = progress or SilentProgress()
    graph = trace(checkpoint.config, sample.window)
    if int(sample.ids.max()) >= checkpoint.config.dims.vocab_size:
        raise ElmExportError(
            f"token id {sample.ids.max()} is outside the vocabulary of {checkpoint.source.name}; use the model's tokenizer"
        )
    work = work or MemoryWork()
    layers = layer_stages(graph)[:-1]  # of the head only the input counts
    costs = [_cost(stage, graph, hessian) for stage in layers]
    done = work.stages_done()
    progress.stage(f"calibrating on {sample.tokens:,} tokens", sum(costs[done:]) * sample.tokens)
    ids = torch.from_numpy(sample.ids)

    def measure(number: int) -> StageResult:
        stage, observer = layers[number], _Observer(graph, layers[number], hessian)
        loaded = stage.load(lambda spec: checkpoint.tensor(spec.name), torch_device())
        with work.boundary(number, len(ids), last=number + 1 == len(layers)) as boundary:
            for rows in batches(len(ids), sample.window):
                boundary.write(rows, loaded(ids[rows] if number == 0 else boundary.read(rows), observe=observer))
                progress.advance(costs[number] * ids[rows].numel())
        return observer.result(checkpoint)

    for number in range(done, len(layers)):
        work.finish(number, measure(number))
    return _merge(checkpoint, sample, graph, hessian, work.results())


@dataclass
class _Sums:
    """Running sums over the rows x `[rows, width]` of one activation."""

    width: int
    hessian: bool
    routed: bool  # whether only some tokens come: those that go to an expert
    rows: int = 0
    square: Tensor = field(init=False)  # float64 [width], on the CPU: not every device has float64
    magnitude: Tensor = field(init=False)  # float64 [width], on the CPU
    products: Tensor | None = None  # float32 [width, width], on the device of x; true on and below the diagonal's blocks

    def __post_init__(self) -> None:
        self.square, self.magnitude = torch.zeros(2, self.width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        self.rows += len(x)
        self.square += x.square().sum(0).cpu()
        self.magnitude += x.abs().sum(0).cpu()
        if self.hessian:
            if self.products is None:
                self.products = torch.zeros(self.width, self.width, device=x.device)
            add_products(self.products, x)

    def tensors(self, name: str) -> dict[str, Tensor]:
        rows = max(self.rows, 1)  # no token may have gone to an expert
        mean_square = (self.square / rows).to(torch.float32)
        found = {f"{name}.{MEAN_SQUARE}": mean_square, f"{name}.{MEAN_ABS}": (self.magnitude / rows).to(torch.float32)}
        if self.routed:
            found[f"{name}.{ROUTED}"] = torch.tensor([self.rows])
        if self.hessian:
            products = torch.zeros(self.width, self.width) if self.products is None else self.products
            hessian = mirror(products.div_(rows)).cpu()
            hessian.diagonal().copy_(mean_square)  # the same figure, but summed in float64
            found[f"{name}.{HESSIAN}"] = hessian
        return found


class _Observer:
    """Observer of one stage: the inputs of linear layers, wherever they are, and of norms, and the residual stream."""

    def __init__(self, graph: Graph, stage: Stage, hessian: bool) -> None:
        self._peak = ResidualPeak()
        self._norm_peaks: dict[str, float] = {}
        made = {name for node in stage.nodes for name in node.observed}
        self._sums = {
            name: _Sums(_width(graph, name), hessian, graph.values[name].shape[0] == ir.ROUTED)
            for name in dict.fromkeys(graph.linear_inputs.values())
            if name in made
        }
        norms = (node for node in graph.nodes if node.op == "rms_norm")
        self._norms = {node.inputs["x"]: node.weights["weight"].name for node in norms}
        self._attention = {node.inputs["qkv"]: node for node in stage.nodes if node.op == "attention"}
        self._head_dim = graph.dims.head_dim

    def __call__(self, node: Node, out: Tensor) -> None:
        self._peak(node, out)
        name = node.outputs[0]
        if name in self._sums:
            self._sums[name].add(out.flatten(0, -2))
        if name in self._norms:
            self._raise(self._norms[name], out.square().sum(-1).max())
        if name in self._attention:
            self._heads(self._attention[name], out)

    def result(self, checkpoint: Checkpoint) -> StageResult:
        """The statistics of all batches."""
        tensors: dict[str, Tensor] = {}
        for name, sums in self._sums.items():
            tensors |= sums.tensors(name)
        figures = [self._peak.value, *self._norm_peaks.values(), *(float(t.sum()) for t in tensors.values() if t.ndim == 1)]
        if not all(map(math.isfinite, figures)):
            raise ElmExportError(
                f"{checkpoint.source.name} gives activations that are not finite in float32; the checkpoint is damaged, download it again"
            )
        return StageResult(tensors, self._peak.value, self._norm_peaks)

    def _heads(self, node: Node, qkv: Tensor) -> None:
        """The q/k norms work on each head by itself, inside the attention."""
        queries, keys = node.attrs["query_heads"], node.attrs["kv_heads"]
        heads = qkv.view(*qkv.shape[:-1], -1, self._head_dim).square().sum(-1).amax((0, 1))
        for argument, which in (("q_norm", heads[:queries]), ("k_norm", heads[queries : queries + keys])):
            if argument in node.weights:
                self._raise(node.weights[argument].name, which.max())

    def _raise(self, norm: str, value: Tensor) -> None:
        self._norm_peaks[norm] = max(float(value), self._norm_peaks.get(norm, 0.0))


def _width(graph: Graph, name: str) -> int:
    width = graph.values[name].shape[-1]
    assert isinstance(width, int)
    return width


def _cost(stage: Stage, graph: Graph, hessian: bool) -> int:
    """Multiplications for each token, about: the measure of progress."""
    read = set(graph.linear_inputs.values())
    total = 1
    for node in stage.nodes:
        products = sum(_width(graph, name) ** 2 for name in read.intersection(node.observed)) // 2 if hessian else 0
        matrices = sum(spec.size for spec in node.weights.values()) if node.op in ("linear", "moe") else 0
        # Of the experts, a token goes to some.
        total += (matrices + products) * node.attrs["active"] // node.experts if node.experts else matrices + products
    return total


def _merge(checkpoint: Checkpoint, sample: Sample, graph: Graph, hessian: bool, results: list[StageResult]) -> Statistics:
    counts = torch.bincount(torch.from_numpy(sample.ids).flatten(), minlength=checkpoint.config.dims.vocab_size)
    norm_peaks: dict[str, float] = {}
    for result in results:
        norm_peaks |= result.norm_peaks
    # A chain reads nothing: tensors that lie in files stay there.
    tensors = ChainMap({TOKEN_COUNTS: counts}, *(result.tensors for result in results))  # type: ignore[arg-type]
    facts = Facts(
        model=checkpoint.source.name,
        identity=checkpoint.identity(),
        text=sample.words,
        text_sha256=sample.sha256,
        tokens=sample.tokens,
        window=sample.window,
        hessian=hessian,
        inputs=graph.linear_inputs,
        residual_peaks=tuple(result.residual_peak for result in results[:-1]),  # the final norm writes nothing to the stream
        norm_peaks=_in_order(norm_peaks, checkpoint),
    )
    return Statistics(facts, tensors)


def _in_order(peaks: Mapping[str, float], checkpoint: Checkpoint) -> dict[str, float]:
    return {name: peaks[name] for name in checkpoint.specs if name in peaks}
