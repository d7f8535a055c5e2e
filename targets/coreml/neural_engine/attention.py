"""Causal grouped-query attention, one KV head at a time.

`qkv` comes as `[1, (H + 2K) d, 1, T]`. Inside, heads are `[1, heads, T, d]`, the layout of the cache. Query heads that read one KV head lie
behind one another, so its G queries of T tokens are one matrix of G T rows: two matrix products per KV head, keys read once, no fused
attention. The scale `d ** -0.5` is in the queries' RoPE tables. What does not depend on the layer (tables' rows, mask) is computed once.
"""

from __future__ import annotations

from coremltools.converters.mil.mil import Builder as mb

from elmexport.graph.ir import Graph, Node
from targets.coreml.interface import query_groups
from targets.coreml.neural_engine.cache import Cache, head_of
from targets.coreml.norm import head_norm
from targets.coreml.packing import Var, WeightFile
from targets.coreml.rope import RotaryTables, rotate


class HeadwiseAttention:
    """Lowers the `attention` nodes of one function, in the order of the layers."""

    def __init__(self, graph: Graph, tokens: int, file: WeightFile, cache: Cache) -> None:
        self.graph, self.tokens, self.file, self.cache = graph, tokens, file, cache
        tables = RotaryTables(graph)
        self.query_rope = self._rope("query", tables, graph.dims.head_dim**-0.5)
        self.key_rope = self._rope("key", tables, 1.0)
        self.masks = self._masks()

    def __call__(self, qkv: Var, node: Node) -> Var:
        """`[1, H d, 1, T]` from `qkv` `[1, (H + 2K) d, 1, T]`."""
        heads, kv_heads = node.attrs["query_heads"], node.attrs["kv_heads"]
        query, key, value = mb.split(x=self._split_heads(qkv, heads + 2 * kv_heads), split_sizes=[heads, kv_heads, kv_heads], axis=1)
        query = rotate(head_norm(query, node, "q_norm", self.file), *self.query_rope)
        key = rotate(head_norm(key, node, "k_norm", self.file), *self.key_rope)
        keys, values = self.cache.append(key, value)
        group = heads // kv_heads
        rows = mb.reshape(x=query, shape=[1, kv_heads, group * self.tokens, self.graph.dims.head_dim])
        outputs = [_attend(head_of(rows, head), keys[head], values[head], self.masks[group]) for head in range(kv_heads)]
        out = outputs[0] if kv_heads == 1 else mb.concat(values=outputs, axis=1)
        return self._join_heads(out, heads)

    def _split_heads(self, x: Var, heads: int) -> Var:
        """`[1, heads, T, d]` of `[1, heads d, 1, T]`."""
        size = self.graph.dims.head_dim
        if self.tokens == 1:
            return mb.reshape(x=x, shape=[1, heads, 1, size])
        return mb.transpose(x=mb.reshape(x=x, shape=[1, heads, size, self.tokens]), perm=[0, 1, 3, 2])

    def _join_heads(self, x: Var, heads: int) -> Var:
        """`[1, heads d, 1, T]` of `[1, K, G T, d]`."""
        size = self.graph.dims.head_dim
        if self.tokens > 1:
            x = mb.transpose(x=mb.reshape(x=x, shape=[1, heads, self.tokens, size]), perm=[0, 1, 3, 2])
        return mb.reshape(x=x, shape=[1, heads * size, 1, self.tokens])

    def _rope(self, name: str, tables: RotaryTables, scale: float) -> tuple[Var, Var]:
        """Rows of the cosine and sine tables at the tokens' places, `[1, 1, T, d]`, times `scale`."""
        cosines = self.file.table(f"rope_{name}_cos", lambda: tables.cosines(scale))
        sines = self.file.table(f"rope_{name}_sin", lambda: tables.sines(scale))
        return mb.gather(x=cosines, indices=self.cache.positions, axis=2), mb.gather(x=sines, indices=self.cache.positions, axis=2)

    def _masks(self) -> dict[int, Var]:
        """By G: the cache's mask once for each of the G queries of a token, `[1, 1, G T, length]`; for one token, its row serves all."""
        mask = self.cache.mask()
        return {
            group: mask if self.tokens == 1 or group == 1 else mb.concat(values=[mask] * group, axis=2)
            for group in query_groups(self.graph)
        }


def _attend(query: Var, keys: Var, values: Var, mask: Var) -> Var:
    """`[1, 1, rows, d]` of queries `[1, 1, rows, d]`, keys and values `[1, 1, length, d]`."""
    scores = mb.add(x=mb.matmul(x=query, y=keys, transpose_y=True), y=mask)
    return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=values)
