"""Causal grouped-query attention over the cache states, for any number of tokens, with iOS 18's fused operation.

`qkv` comes as `[1, T, (H + 2K) d]`. Inside, heads are `[1, heads, T, d]`, the layout of the cache. Query heads that read one KV head lie
behind one another, so the G queries of a KV head over T tokens are G T rows: keys and values are read as they lie, none is repeated. Where
the tokens stand follows from the mask's width. What does not depend on the layer (tables' rows, mask) is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from coremltools.converters.mil.mil import Builder as mb

from elmexport.contracts.coreml_gpu import CAUSAL_MASK, INPUT_IDS, KEY_CACHE, VALUE_CACHE
from elmexport.graph.ir import Graph, Node
from targets.coreml.interface import query_groups
from targets.coreml.norm import head_norm
from targets.coreml.packing import Var, WeightFile
from targets.coreml.rope import RotaryTables, rotate

_HIDDEN = -4e4  # added to the scores of tokens that are not to be seen; two of them are infinite in fp16, one is not


class FusedAttention:
    """Lowers the `attention` nodes, in the order of the layers."""

    def __init__(self, graph: Graph, file: WeightFile, inputs: Mapping[str, Var]) -> None:
        self.graph, self.file = graph, file
        self.size = graph.dims.head_dim
        self.given_mask = inputs[CAUSAL_MASK]
        self.states = (inputs[KEY_CACHE], inputs[VALUE_CACHE])
        self.caches = [mb.read_state(input=state) for state in self.states]
        self.first_head = 0  # of the layer to come, on the caches' axis
        self.end = mb.slice_by_index(x=mb.shape(x=self.given_mask), begin=[3], end=[4])
        self.position = mb.sub(x=self.end, y=mb.slice_by_index(x=mb.shape(x=inputs[INPUT_IDS]), begin=[1], end=[2]))
        tables = RotaryTables(graph)
        self.rope = [
            self._tokens(file.table(name, make), self.position) for name, make in (("rope_cos", tables.cosines), ("rope_sin", tables.sines))
        ]
        self.masks: dict[int, Var] = {}  # by the query heads of a KV head; they need the first layer's keys

    def __call__(self, qkv: Var, node: Node) -> Var:
        """`[1, T, H d]` from `qkv` `[1, T, (H + 2K) d]`."""
        heads, kv_heads = node.attrs["query_heads"], node.attrs["kv_heads"]
        split = mb.transpose(x=mb.reshape(x=qkv, shape=[1, -1, heads + 2 * kv_heads, self.size]), perm=[0, 2, 1, 3])
        query, key, value = mb.split(x=split, split_sizes=[heads, kv_heads, kv_heads], axis=1)
        query = rotate(head_norm(query, node, "q_norm", self.file), *self.rope)
        key = rotate(head_norm(key, node, "k_norm", self.file), *self.rope)
        keys, values = (self._append(which, new, kv_heads) for which, new in enumerate((key, value)))
        self.first_head += kv_heads
        if not self.masks:
            self.masks = self._masks()
        rows = mb.reshape(x=query, shape=[1, kv_heads, -1, self.size])
        out = mb.scaled_dot_product_attention(query=rows, key=keys, value=values, attn_mask=self.masks[heads // kv_heads])
        out = mb.transpose(x=mb.reshape(x=out, shape=[1, heads, -1, self.size]), perm=[0, 2, 1, 3])
        return mb.reshape(x=out, shape=[1, -1, heads * self.size])

    def _append(self, which: int, new: Var, kv_heads: int) -> Var:
        """Write `new` `[1, K, T, d]` into a cache at `position`; returns the layer's part of it up to `end`, `[1, K, end, d]`."""
        first, last = self.first_head, self.first_head + kv_heads
        updated = mb.slice_update(
            x=self.caches[which], update=new, begin=_corner(0, first, self.position, 0), end=_corner(1, last, self.end, self.size)
        )
        cache = self.caches[which] = mb.coreml_update_state(state=self.states[which], value=updated)
        heads = mb.slice_by_index(x=cache, begin=[0, first, 0, 0], end=[1, last, self.graph.context, self.size])
        return self._tokens(heads, np.array([0], np.int32))

    def _tokens(self, x: Var, start: Var) -> Var:
        """`x` `[1, heads, context, d]` from `start` to `end`. The masks keep the other sizes known to the compiler."""
        others = [True, True, False, True]
        return mb.slice_by_index(x=x, begin=_corner(0, 0, start, 0), end=_corner(0, 0, self.end, 0), begin_mask=others, end_mask=others)

    def _masks(self) -> dict[int, Var]:
        """By G, `[1, 1, G T, end]`: the mask that was given, plus `_HIDDEN` behind each token's own place, and on a first place never written.

        That place is recognized by a key of zeros: what a state begins with, and no key of a token.
        """
        places = self.file.table("places", lambda: np.arange(self.graph.context, dtype=np.int32))
        columns = mb.expand_dims(x=mb.slice_by_index(x=places, begin=[0], end=self.end), axes=[0, 1, 2])
        rows = mb.expand_dims(x=mb.slice_by_index(x=places, begin=self.position, end=self.end), axes=[0, 1, 3])
        later = mb.cast(x=mb.greater(x=columns, y=rows), dtype="fp16")
        first_key = mb.slice_by_index(x=self.caches[0], begin=[0, 0, 0, 0], end=[1, 1, 1, self.size])
        empty = mb.equal(x=mb.reduce_max(x=mb.abs(x=first_key), axes=[3], keep_dims=True), y=np.float16(0))
        unwritten = mb.mul(x=mb.cast(x=empty, dtype="fp16"), y=mb.cast(x=mb.less(x=columns, y=np.int32(1)), dtype="fp16"))
        hidden = mb.mul(x=mb.maximum(x=later, y=unwritten), y=np.float16(_HIDDEN))
        mask = mb.add(x=hidden, y=self.given_mask)
        return {group: mask if group == 1 else mb.concat(values=[mask] * group, axis=2) for group in query_groups(self.graph)}


def _corner(*places: Var | int) -> Var:
    """A corner of a slice `[4]`, some of its places known at run time only."""
    return mb.concat(values=[np.array([place], np.int32) if isinstance(place, int) else place for place in places], axis=0)
