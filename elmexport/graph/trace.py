"""Tracing: a model's module to a `Graph`, by one forward pass on meta tensors in which every op of the vocabulary is written down.

No weight is ever allocated, so the 3B model traces in the memory of its Python objects. `torch.export` gives the same nodes; what it loads
(dynamo, sympy) takes longer than the rest of a small export.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elmexport.errors import ElmExportError
from elmexport.graph.dims import ModelDims
from elmexport.graph.ir import BATCH, IDS, ROUTED, TOKENS, Graph, Node, Value
from elmexport.graph.ops import FAKE, NAMESPACE
from elmexport.weights import Role, WeightSpec


def trace_module(
    make: Callable[[], nn.Module], dims: ModelDims, specs: Iterable[WeightSpec], context: int | None = None, *, prefix: str = ""
) -> Graph:
    """Trace one forward pass of the module that `make` gives over a cache of `context` tokens (`dims.context` where None).

    `specs` are the module's parameters; `prefix` is what their names begin with, left out of the names of nodes.

    Raises:
        ElmExportError: `context` is not in 1 … `dims.max_context`.
    """
    context = dims.context if context is None else context
    if not 1 <= context <= dims.max_context:
        raise ElmExportError(
            f"context is {context}; this model takes 1 to {dims.max_context} tokens, as far as its position embedding reaches"
        )
    known = {spec.name: spec for spec in specs}
    # Sizes that no other dimension can have: the widest activation is three weights side by side.
    batch = 3 * max(context, dims.head_dim, *(size for spec in known.values() for size in spec.shape)) + 1
    tokens = batch + 1 if context > 1 else 1
    with torch.device("meta"):
        model = make()
        ids, position = torch.zeros(batch, tokens, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        keys, values = ([torch.zeros(batch, layer.kv_heads, context, dims.head_dim) for layer in dims.layers] for _ in range(2))
    symbols = {batch: BATCH, tokens: TOKENS} if context > 1 else {batch: BATCH}
    trace = _Trace(known, {parameter: name for name, parameter in model.named_parameters()}, symbols, prefix)
    trace.define(ids, IDS)
    trace.define(position, "position")
    for caches, name in ((keys, "k_cache"), (values, "v_cache")):
        for layer, cache in enumerate(caches):
            trace.define(cache, f"{name}.{layer}")
    with trace:
        logits, new_keys, new_values = model(ids, position, keys, values)
    names = trace.names
    return Graph(
        dims,
        context,
        tuple(trace.nodes),
        trace.values,
        names[logits],
        tuple(names[tensor] for tensor in new_keys),
        tuple(names[tensor] for tensor in new_values),
    )


class _Trace(TorchFunctionMode):
    """Writes down the ops that run while it is entered, and gives them fake results.

    Args:
        specs: of the parameters, by name.
        weight_of: names of the parameters.
        symbols: sizes that stand for a symbol.
    """

    def __init__(self, specs: Mapping[str, WeightSpec], weight_of: Mapping[Tensor, str], symbols: Mapping[int, str], prefix: str) -> None:
        super().__init__()
        self.names: dict[Tensor, str] = {}  # by identity, which keeps them alive
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self._specs, self._weight_of, self._symbols, self._prefix = specs, weight_of, symbols, prefix
        self._layers: dict[str, int | None] = {}  # of the node that makes each value

    def define(self, tensor: Tensor, name: str) -> None:
        """Call `tensor` `name` from here on."""
        self.names[tensor] = name
        self.values[name] = Value(name, tuple(self._symbols.get(size, size) for size in tensor.shape))

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        assert isinstance(func, torch._ops.OpOverload) and func.namespace == NAMESPACE, f"{func} is not in the op vocabulary"
        op = func._schema.name.split("::")[1]
        given = inspect.signature(FAKE[op]).bind(*args, **(kwargs or {}))
        result = FAKE[op](*given.args, **given.kwargs)
        self._node(op, given.arguments, result)
        return result

    def _node(self, op: str, arguments: Mapping[str, Any], result: Tensor | tuple[Tensor, ...]) -> None:
        inputs: dict[str, str] = {}
        weights: dict[str, WeightSpec] = {}
        attrs: dict[str, Any] = {}
        for argument, given in arguments.items():
            if isinstance(given, list):  # of weights, one for each expert
                weights |= {f"{argument}.{i}": self._specs[self._weight_of[item]] for i, item in enumerate(given)}
            elif not isinstance(given, Tensor):
                if given is not None:
                    attrs[argument] = given
            elif given in self._weight_of:
                weights[argument] = self._specs[self._weight_of[given]]
            else:
                inputs[argument] = self.names[given]
        first = next(iter(weights.values()), None)
        layer, role = (None, None) if first is None else (first.layer, first.role)
        if op == "linear" and role is Role.EMBEDDING:
            role = Role.LM_HEAD  # the tied head borrows the embedding table
        if op == "moe":
            role = Role.MOE_EXPERTS_DOWN  # what its output comes from
        if first is None or op == "attention":  # the layer that it continues
            layer = max((found for name in inputs.values() if (found := self._layers.get(name)) is not None), default=None)
        name = self._name(op, layer, role, first)
        outputs = [name, f"{name}.k_cache", f"{name}.v_cache"] if op == "attention" else [name]
        for output, tensor in zip(outputs, result if isinstance(result, tuple) else (result,), strict=True):
            self.define(tensor, output)
        self._layers |= dict.fromkeys(outputs, layer)
        node = Node(op, name, inputs, weights, attrs, tuple(outputs), layer, role if op in ("linear", "embed", "moe") else None)
        for expert in range(node.experts):
            for name, part in ((node.expert_input(expert), "gate"), (node.expert_hidden(expert), "down")):
                self.values[name] = Value(name, (ROUTED, node.weights[f"{part}.{expert}"].shape[1]))
        self.nodes.append(node)

    def _name(self, op: str, layer: int | None, role: Role | None, weight: WeightSpec | None) -> str:
        """Nodes with a weight are called after it (`layers.3.ffn.proj_1`), the others after their op (`layers.3.swiglu`)."""
        if role is Role.LM_HEAD:
            return "lm_head"
        if weight is not None and op not in ("attention", "moe"):
            return weight.name.removeprefix(self._prefix).removesuffix(".weight")
        taken = sum(node.op == op and node.layer == layer for node in self.nodes)
        return f"layers.{layer}.{op}" + (f".{taken}" if taken else "")
