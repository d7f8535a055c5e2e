"""KV cache and causal mask of one function: keys and values are in Core ML's states, or in the function's inputs.

A layer asks for its keys and values in its turn; those of all layers lie on one axis, one layer's heads after the other's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from coremltools.converters.mil.mil import Builder as mb

from elmexport.contracts.coreml import KEY_CACHE, NEW_KEYS, NEW_VALUES, POSITION, VALUE_CACHE
from elmexport.graph.ir import Graph
from targets.coreml.packing import Var, WeightFile

_HIDDEN = -4e4  # added to the scores of tokens that must not be seen: -inf breaks the Neural Engine's softmax


class Cache(ABC):
    """KV cache in a function for `tokens` tokens. `positions` int32 `[tokens]` are their places."""

    def __init__(self, graph: Graph, tokens: int, file: WeightFile, inputs: Mapping[str, Var]) -> None:
        self.graph, self.tokens = graph, tokens
        self.sources = (inputs[KEY_CACHE], inputs[VALUE_CACHE])
        self.position = inputs[POSITION]
        self.positions = mb.add(x=self.position, y=np.arange(tokens, dtype=np.int32)) if tokens > 1 else self.position
        self._first_head = 0  # of the layer to come, on the caches' axis
        self._columns = file.table("columns", lambda: np.arange(graph.context, dtype=np.int32)[None, None, None])

    def append(self, key: Var, value: Var) -> tuple[list[Var], list[Var]]:
        """Append `key` and `value` `[1, K, tokens, d]` of the next layer.

        Returns its keys and values as its tokens see them, `[1, 1, length, d]` for each KV head.
        """
        first, last = self._first_head, self._first_head + key.shape[1]
        self._first_head = last
        return self._append(0, key, first, last), self._append(1, value, first, last)

    @abstractmethod
    def _append(self, which: int, new: Var, first: int, last: int) -> list[Var]:
        """Keys (`which` 0) or values (1) of heads `first` to `last`."""

    @abstractmethod
    def mask(self) -> Var:
        """Causal mask, fp16 `[1, 1, tokens, length]`: 0 for what a token sees, `_HIDDEN` for what it does not."""

    def outputs(self) -> list[Var]:
        """Outputs that the function has to give beside its result."""
        return []


class StateCache(Cache):
    """KV cache in Core ML's states. Tokens are written first, and then everything up to a token's own place is seen."""

    def __init__(self, graph: Graph, tokens: int, file: WeightFile, inputs: Mapping[str, Var]) -> None:
        super().__init__(graph, tokens, file, inputs)
        self._end = mb.add(x=self.position, y=np.int32(tokens))
        self._caches = [mb.read_state(input=state) for state in self.sources]

    def _append(self, which: int, new: Var, first: int, last: int) -> list[Var]:
        updated = mb.slice_update(
            x=self._caches[which],
            update=new,
            begin=mb.concat(values=[np.array([0, first], np.int32), self.position, np.array([0], np.int32)], axis=0),
            end=mb.concat(values=[np.array([1, last], np.int32), self._end, np.array([new.shape[3]], np.int32)], axis=0),
        )
        cache = self._caches[which] = mb.coreml_update_state(state=self.sources[which], value=updated)
        return [head_of(cache, head) for head in range(first, last)]

    def mask(self) -> Var:
        return _hide(mb.greater(x=self._columns, y=_rows(self.positions)))


class InputCache(Cache):
    """KV cache in the function's inputs: the caller writes into them what the function gives. Seen are the cache up to `position`, then the new tokens."""

    def __init__(self, graph: Graph, tokens: int, file: WeightFile, inputs: Mapping[str, Var]) -> None:
        super().__init__(graph, tokens, file, inputs)
        self._new: tuple[list[Var], list[Var]] = ([], [])

    def _append(self, which: int, new: Var, first: int, last: int) -> list[Var]:
        self._new[which].append(new)
        _, _, context, size = self.sources[which].shape
        before = mb.slice_by_index(x=self.sources[which], begin=[0, first, 0, 0], end=[1, last, context, size])
        both = mb.concat(values=[before, new], axis=2)
        return [head_of(both, head) for head in range(last - first)]

    def mask(self) -> Var:
        # One row for each token, although all see the same of the cache: parts that are joined have the same rows.
        last = mb.add(x=self.position, y=np.full(self.tokens, -1, np.int32))
        earlier = _hide(mb.greater(x=self._columns, y=_rows(last)))
        new = _hide(mb.greater(x=mb.reshape(x=self.positions, shape=[1, 1, 1, self.tokens]), y=_rows(self.positions)))
        return mb.concat(values=[earlier, new], axis=3)

    def outputs(self) -> list[Var]:
        return [mb.concat(values=new, axis=1, name=name) for new, name in zip(self._new, (NEW_KEYS, NEW_VALUES), strict=True)]


def head_of(x: Var, head: int) -> Var:
    """Head `head` of `[1, heads, rows, d]`, as `[1, 1, rows, d]`."""
    _, heads, rows, size = x.shape
    return x if heads == 1 else mb.slice_by_index(x=x, begin=[0, head, 0, 0], end=[1, head + 1, rows, size])


def _rows(positions: Var) -> Var:
    """`[1, 1, tokens, 1]` of `[tokens]`."""
    return mb.reshape(x=positions, shape=[1, 1, positions.shape[0], 1])


def _hide(where: Var) -> Var:
    return mb.mul(x=mb.cast(x=where, dtype="fp16"), y=np.float16(_HIDDEN))
