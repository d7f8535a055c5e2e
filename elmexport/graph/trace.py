"""Tracing: a model's module to a `Graph`, by `torch.export` on meta tensors and a walk over the exported nodes.

No weight is ever allocated, so the 3B model traces in the memory of its Python objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.export import Dim, export
from torch.fx import Node as FxNode

from elmexport.errors import ElmExportError
from elmexport.graph.dims import ModelDims
from elmexport.graph.ir import BATCH, ROUTED, TOKENS, Graph, Node, Value
from elmexport.graph.ops import NAMESPACE
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
    with torch.device("meta"):
        model = make()
        # Sizes that no dimension of the model can be mistaken for; both are declared dynamic.
        ids = torch.zeros(2, min(3, context), dtype=torch.int64)
        caches = [torch.zeros(2, layer.kv_heads, context, dims.head_dim) for layer in dims.layers]
        position = torch.zeros((), dtype=torch.int64)
    batch, tokens = Dim(BATCH, min=1), Dim(TOKENS, min=1, max=max(2, context))
    cache_dims = [{0: batch} for _ in caches]
    program = export(
        model,
        (ids, position, caches, [cache.clone() for cache in caches]),
        dynamic_shapes=({0: batch, 1: tokens} if context > 1 else {0: batch}, None, cache_dims, cache_dims),
        strict=False,
    )
    return _Builder(dims, specs, context, prefix, program).build()


class _Builder:
    """Turns an `ExportedProgram` over the op vocabulary into a `Graph`."""

    def __init__(
        self, dims: ModelDims, specs: Iterable[WeightSpec], context: int, prefix: str, program: torch.export.ExportedProgram
    ) -> None:
        self.dims, self.context, self.prefix, self.program = dims, context, prefix, program
        self.specs = {spec.name: spec for spec in specs}
        self.weight_of = program.graph_signature.inputs_to_parameters  # placeholder name to parameter name
        self.symbols: dict[str, str] = {}
        self.names: dict[FxNode, str] = {}
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.layers: dict[str, int | None] = {}  # of the node that makes each value

    def build(self) -> Graph:
        layers = len(self.dims.layers)
        names = ["ids", "position", *(f"k_cache.{i}" for i in range(layers)), *(f"v_cache.{i}" for i in range(layers))]
        outputs: tuple[FxNode, ...] = ()
        for fx in self.program.graph.nodes:
            if fx.op == "placeholder":
                if fx.name not in self.weight_of:
                    if not self.symbols:  # ids comes first and carries both symbols
                        self.symbols = {str(size): name for size, name in zip(fx.meta["val"].shape, (BATCH, TOKENS), strict=True)}
                    self._define(fx, names.pop(0))
            elif fx.op == "output":
                outputs = fx.args[0]
            elif fx.target is not torch.ops.aten.sym_size.int and "getitem" not in str(fx.target):
                self._node(fx)
        found = [self.names[fx] for fx in outputs]
        return Graph(
            self.dims, self.context, tuple(self.nodes), self.values, found[0], tuple(found[1 : 1 + layers]), tuple(found[1 + layers :])
        )

    def _define(self, fx: FxNode, name: str) -> None:
        self.names[fx] = name
        self.values[name] = Value(name, tuple(size if isinstance(size, int) else self.symbols[str(size)] for size in fx.meta["val"].shape))

    def _node(self, fx: FxNode) -> None:
        assert isinstance(fx.target, torch._ops.OpOverload) and fx.target.namespace == NAMESPACE, f"{fx.target} is not in the op vocabulary"
        op = fx.target._schema.name.split("::")[1]
        inputs: dict[str, str] = {}
        weights: dict[str, WeightSpec] = {}
        attrs: dict[str, Any] = {}
        for argument, given in zip(fx.target._schema.arguments, fx.args, strict=True):
            if isinstance(given, list):  # of weights, one for each expert
                weights |= {f"{argument.name}.{i}": self.specs[self.weight_of[item.name]] for i, item in enumerate(given)}
            elif not isinstance(given, FxNode):
                if given is not None:
                    attrs[argument.name] = given
            elif given.name in self.weight_of:
                weights[argument.name] = self.specs[self.weight_of[given.name]]
            else:
                inputs[argument.name] = self.names[given]
        first = next(iter(weights.values()), None)
        layer, role = (None, None) if first is None else (first.layer, first.role)
        if op == "linear" and role is Role.EMBEDDING:
            role = Role.LM_HEAD  # the tied head borrows the embedding table
        if op == "moe":
            role = Role.MOE_EXPERTS_DOWN  # what its output comes from
        if first is None or op == "attention":  # the layer that it continues
            layer = max((found for name in inputs.values() if (found := self.layers.get(name)) is not None), default=None)
        name = self._name(op, layer, role, first)
        outputs = [name]
        if op == "attention":
            outputs = [name, f"{name}.k_cache", f"{name}.v_cache"]
            for user in fx.users:
                which = user.args[1]
                assert isinstance(which, int)
                self._define(user, outputs[which])
        else:
            self._define(fx, name)
        self.layers |= dict.fromkeys(outputs, layer)
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
            return weight.name.removeprefix(self.prefix).removesuffix(".weight")
        taken = sum(node.op == op and node.layer == layer for node in self.nodes)
        return f"layers.{layer}.{op}" + (f".{taken}" if taken else "")
