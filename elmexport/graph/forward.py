"""Forward pass of a traced graph: of one batch with KV caches, or stage by stage over many sequences.

A weight is asked for when its node runs, so it may be resident, streamed from a checkpoint, or replaced by another. Observers see every
node's output. Everything is computed on one torch device; what enters may lie on another, and what leaves lies on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from elmexport.graph import ops
from elmexport.graph.ir import Graph, Node
from elmexport.weights import Role, WeightSpec

BATCH_TOKENS = 2048  # run at once: enough for matrix products at full speed, few enough that a layer's activations stay small
_WIDENED = 1 << 21  # values of a matrix that are brought to another dtype at a time: an embedding's would take more than all else


class Rows(Protocol):
    """Weight `[rows, columns]`, of a `linear` or `embed` node, that is made as it is read."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        """Rows, in any float dtype: those of a slice, or those of the numbers in an int64 tensor on the CPU, `[…, columns]`."""


GetWeight = Callable[[WeightSpec], Tensor]
"""Gives a weight, in any float dtype, on any device."""
GetRows = Callable[[WeightSpec], Tensor | Rows]
"""Gives a weight, whole or made as it is read."""
Observer = Callable[[Node, Tensor], None]
"""Is called with every node and its first output, on the device that computes; of a `moe` node, with what each expert reads before
(see `Node.observed`), as the output of a node of the op "expert"."""


class KVCaches:
    """Static key and value caches of every layer, `[batch, K_n, context, d]`, zero at first; as long as the graph's where None.

    A pass computes on their device and in their dtype.
    """

    def __init__(
        self,
        graph: Graph,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        context: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        context = graph.context if context is None else context
        shapes = [(batch, layer.kv_heads, context, graph.dims.head_dim) for layer in graph.dims.layers]
        self.dtype, self.device = dtype, device or torch.device("cpu")
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer."""
        return self.keys[number], self.values[number]

    def copy_prefix(self, source: KVCaches, tokens: int) -> None:
        """Take over the first `tokens` tokens of `source`, whose batch is one, in every sequence."""
        for own, other in zip([*self.keys, *self.values], [*source.keys, *source.values], strict=True):
            own[:, :, :tokens] = other[:, :, :tokens]


def forward(
    graph: Graph,
    weight: GetRows,
    x: Tensor,
    position: int,
    caches: KVCaches,
    *,
    last: int | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Compute the logits `[batch, tokens, vocab]` of the ids `x` `[batch, tokens]` standing at `position`; writes into `caches`.

    Of a part of a model, `x` and the result are the values `graph.source` and `graph.result`. `last` computes the head for the last tokens
    only (`[batch, last, vocab]`). A large matrix in another dtype than the caches' is widened a slice at a time.
    """
    values = {graph.source: x.to(caches.device)}

    def get(spec: WeightSpec) -> Tensor | Rows:
        found = weight(spec)
        wide = not spec.role.is_expert and len(found.shape) == 2 and spec.size > _WIDENED
        if not isinstance(found, Tensor) or (wide and found.dtype != caches.dtype):
            return _Widened(found, caches.device, caches.dtype)
        return found.to(caches.device, caches.dtype)

    found = _run(graph.nodes, values, get, _attend(caches.layer, position), {graph.result}, last=last, observe=observe)
    return found[graph.result].cpu()


@dataclass(frozen=True)
class _Widened:
    """Rows on the device and in the dtype that a pass computes in."""

    weight: Tensor | Rows
    device: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> Sequence[int]:
        return self.weight.shape

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.weight[rows].to(self.device, self.dtype)


def _embed(ids: Tensor, table: Rows) -> Tensor:
    return table[ids.cpu()]


def _linear(x: Tensor, weight: Rows) -> Tensor:
    rows, columns = weight.shape
    out = x.new_empty((*x.shape[:-1], rows))
    size = max(1, _WIDENED // columns)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        out[..., part] = ops.EAGER["linear"](x, weight[part])
    return out


_BY_ROWS: Mapping[str, Callable[..., Tensor]] = {"embed": _embed, "linear": _linear}


def step(graph: Graph, weight: GetWeight, ids: Tensor, positions: Sequence[int], caches: Sequence[KVCaches]) -> Tensor:
    """Compute the logits `[sequences, vocab]` of one token each of several sequences.

    Each of `ids` `[sequences]` stands at its position of its own caches. All but attention runs on every sequence at once.
    """
    device, dtype = caches[0].device, caches[0].dtype

    def attend(node: Node, qkv: Tensor, *norms: Tensor | None) -> Tensor:
        alone = (_attend(own.layer, position) for own, position in zip(caches, positions, strict=True))
        return torch.cat([one(node, row[None], *norms) for one, row in zip(alone, qkv, strict=True)])

    values = {graph.source: ids[:, None].to(device)}
    found = _run(graph.nodes, values, lambda spec: weight(spec).to(device, dtype), attend, {graph.result})
    return found[graph.result][:, 0].cpu()


@dataclass(frozen=True)
class Stage:
    """Consecutive nodes of `graph`, which run over all sequences before the next ones do.

    `inputs` are the activations (at first the ids) that it reads from before, `outputs` those of its own that are read after it: by later
    stages, or as the result of the graph.
    """

    name: str  # "embedding", "layer 3", "norm", "head"; of a stage that a linear layer begins, that node's
    graph: Graph
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def weights(self) -> list[WeightSpec]:
        """Every weight of the stage, in the order of use."""
        return [spec for node in self.nodes for spec in node.weights.values()]

    def load(self, weight: GetWeight, device: torch.device | None = None) -> LoadedStage:
        """Read the stage's weights as float32 onto `device` (the CPU where None)."""
        device = device or torch.device("cpu")
        return LoadedStage(self, {spec.name: weight(spec).to(device).to(torch.float32) for spec in self.weights()}, device)


@dataclass(frozen=True)
class LoadedStage:
    """A stage and its weights by name, float32 on `device`."""

    stage: Stage
    weights: Mapping[str, Tensor]
    device: torch.device

    def run(
        self, values: Mapping[str, Tensor], *, observe: Observer | None = None, products: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Compute the stage's outputs from its inputs `[sequences, tokens, …]`; every sequence starts at position 0.

        `products` is the dtype that linear layers multiply in, float32 where None. Autograd sees through all of it.
        """
        stage, dims = self.stage, self.stage.graph.dims
        sequences, tokens = values[stage.inputs[0]].shape[:2]

        def caches(layer: int) -> tuple[Tensor, Tensor]:
            shape = (sequences, dims.layers[layer].kv_heads, tokens, dims.head_dim)
            return torch.empty(shape, device=self.device), torch.empty(shape, device=self.device)

        own = {name: values[name].to(self.device) for name in stage.inputs}
        attend = _attend(caches, 0)
        found = _run(stage.nodes, own, lambda spec: self.weights[spec.name], attend, stage.outputs, observe=observe, products=products)
        return {name: found[name].cpu() for name in stage.outputs}

    def __call__(self, x: Tensor, *, observe: Observer | None = None, products: torch.dtype | None = None) -> Tensor:
        """Compute the one output of a stage that has one input; see `run`."""
        (source,), (result,) = self.stage.inputs, self.stage.outputs
        return self.run({source: x}, observe=observe, products=products)[result]


def layer_stages(graph: Graph) -> list[Stage]:
    """Cut `graph` at layer boundaries: the embedding, every layer, the final norm, the head. Between two lives the residual stream alone."""
    groups: dict[str, list[Node]] = {}
    for node in graph.nodes:
        outside = "embedding" if node.op == "embed" else "head" if node.role is Role.LM_HEAD else "norm"
        groups.setdefault(outside if node.layer is None else f"layer {node.layer}", []).append(node)
    return _stages(graph, groups.items())


def linear_stages(graph: Graph) -> list[Stage]:
    """Cut `graph` before every linear layer and every mixture of experts: at most the first node of each stage is one."""
    groups: list[list[Node]] = [[]]
    for node in graph.nodes:
        if node.op in ("linear", "moe"):
            groups.append([])
        groups[-1].append(node)
    return _stages(graph, [(nodes[0].name, nodes) for nodes in groups])


def batches(sequences: int, tokens: int) -> list[slice]:
    """Slice `sequences` of `tokens` tokens each into batches, about `BATCH_TOKENS` tokens in a slice."""
    step = max(1, BATCH_TOKENS // tokens)
    return [slice(start, min(start + step, sequences)) for start in range(0, sequences, step)]


def stage_by_stage(stages: Iterable[Stage], weight: GetWeight, x: Tensor, device: torch.device | None = None) -> Iterator[Tensor]:
    """Yield what each of `stages`, one after another, makes of all sequences `x` `[sequences, tokens, …]`.

    The weights of one stage are in memory at a time.
    """
    for stage in stages:
        loaded = stage.load(weight, device)
        x = torch.cat([loaded(x[rows]) for rows in batches(*x.shape[:2])])
        yield x


def _stages(graph: Graph, groups: Iterable[tuple[str, Sequence[Node]]]) -> list[Stage]:
    activations = {graph.source, *(node.outputs[0] for node in graph.nodes)}  # caches and the position are none
    named = list(groups)
    found = []
    for number, (name, nodes) in enumerate(named):
        made = {node.outputs[0]: None for node in nodes}
        read = {value: None for node in nodes for value in node.inputs.values() if value in activations}
        later = {value for _, rest in named[number + 1 :] for node in rest for value in node.inputs.values()} | {graph.result}
        inputs, outputs = tuple(x for x in read if x not in made), tuple(x for x in made if x in later)
        found.append(Stage(name, graph, tuple(nodes), inputs, outputs))
    return found


def _run(
    nodes: Sequence[Node],
    values: dict[str, Tensor],
    weight: Callable[[WeightSpec], Any],
    attend: Callable[[Node, Tensor, Tensor | None, Tensor | None], Tensor],
    wanted: Collection[str],
    *,
    last: int | None = None,
    observe: Observer | None = None,
    products: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run `nodes` on `values`, activations by name, which are dropped after their last use unless they are `wanted`.

    `attend` computes an attention node from queries, keys and values together and the weights of their norms.
    """
    remaining = Counter(name for node in nodes for name in node.inputs.values())
    remaining.update(wanted)
    for node in nodes:
        x = {argument: values[name] for argument, name in node.inputs.items() if name in values}
        if last is not None and node.role is Role.LM_HEAD:
            x["x"] = x["x"][:, -last:]
        w = {} if node.op == "moe" else {argument: weight(spec) for argument, spec in node.weights.items()}
        if node.op == "moe":
            out = _experts(node, x, weight, observe)
        elif node.op == "attention":
            out = attend(node, x["qkv"], w.get("q_norm"), w.get("k_norm"))
        else:
            if products is not None and node.op == "linear":
                x, w = ({name: tensor.to(products) for name, tensor in tensors.items()} for tensors in (x, w))
            table = ops.EAGER if all(isinstance(tensor, Tensor) for tensor in w.values()) else _BY_ROWS
            out = table[node.op](**x, **w, **node.attrs)
            if products is not None:
                out = out.to(torch.float32)
            if node.weight_scale != 1.0:
                out = out * node.weight_scale
        if observe is not None:
            observe(node, out)
        values[node.outputs[0]] = out
        for name in node.inputs.values():
            remaining[name] -= 1
            if not remaining[name]:
                values.pop(name, None)
    return values


def _attend(
    caches: Callable[[int], tuple[Tensor, Tensor]], position: int
) -> Callable[[Node, Tensor, Tensor | None, Tensor | None], Tensor]:
    """Attention of tokens at `position`; `caches` gives the key and value cache of a layer."""

    def attend(node: Node, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        assert node.layer is not None
        return ops.attention_(qkv, q_norm, k_norm, *caches(node.layer), position, **node.attrs)

    return attend


def _experts(node: Node, x: Mapping[str, Tensor], weight: GetWeight, observe: Observer | None) -> Tensor:
    """Run a `moe` node, whose experts' weights are asked for one expert at a time."""

    def expert(number: int) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (weight(node.weights[f"{part}.{number}"]) for part in ("gate", "up", "down"))
        return gate, up, down

    def see(number: int, routed: Tensor, hidden: Tensor) -> None:
        if observe is not None:
            for name, tensor in ((node.expert_input(number), routed), (node.expert_hidden(number), hidden)):
                observe(replace(node, op="expert", outputs=(name,), role=None), tensor)

    out = ops.moe_(x["x"], x["logits"], expert, node.attrs["active"], None if observe is None else see)
    return out if node.weight_scale == 1.0 else out * node.weight_scale
