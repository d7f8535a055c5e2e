"""Rows of a batch among padding: positions of their tokens, and those for which the head is computed."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_ir as ir

from elmexport.contracts.onnx import LOGITS_TO_KEEP
from targets.onnx.builder import GraphBuilder

BATCH, SEQUENCE, TOTAL = "batch_size", "sequence_length", "total_sequence_length"


class Rows:
    """Nodes that follow from `input_ids` `[batch, tokens]` and `attention_mask` `[batch, total]` alone.

    `ids` are the ids with each row rolled to the left by its padding on that side. `last` int32 `[batch]` is the index in the cache of each
    row's last token, `total` the int32 length of the longest row: as GroupQueryAttention wants them.
    """

    def __init__(self, build: GraphBuilder, ids: ir.Value, mask: ir.Value) -> None:
        self._build = build
        self._zero, self._one = self._scalar("zero", 0), self._scalar("one", 1)
        self._lengths = build.op("ReduceSum", "attention_mask.lengths", mask, self._axes("axis_1", 1), keepdims=0)
        self.last = build.op("Cast", "seqlens_k", build.op("Sub", "attention_mask.last", self._lengths, self._one), to=ir.DataType.INT32)
        total = build.op("Squeeze", "attention_mask.total", build.op("Shape", "attention_mask.width", mask, start=1, end=2))
        self.total = build.op("Cast", "total_sequence_length", total, to=ir.DataType.INT32)

        width = build.op("Shape", "input_ids.width", ids, start=1, end=2)
        self._width = build.op("Squeeze", "input_ids.tokens", width)
        new = build.op(
            "Slice", "new_tokens", mask, build.op("Neg", "new_tokens.start", width), self._axes("end", 2**62), self._axes("axis_1", 1)
        )
        # How many columns of padding stand left of the new tokens, and how many in all. `[batch, 1]`
        self._left = build.op("ArgMax", "padding.left", build.op("Cast", "new_tokens.int32", new, to=ir.DataType.INT32), axis=1, keepdims=1)
        count = build.op("ReduceSum", "new_tokens.count", new, self._axes("axis_1", 1), keepdims=1)
        self._padding = build.op("Sub", "padding.all", self._width, count)
        self._columns = build.op("Range", "input_ids.columns", self._zero, self._width, self._one)
        source = build.op("Mod", "rolled.columns", build.op("Add", "rolled.shifted", self._columns, self._left), self._width)
        self.ids = build.op("GatherElements", "rolled.input_ids", ids, source, axis=1)
        self._count = count

    @cached_property
    def start(self) -> ir.Value:
        """The place in the cache of each row's first new token, int64 `[batch]`."""
        new = self._build.op("Squeeze", "new_tokens.rows", self._count, self._axes("axis_1", 1))
        return self._build.op("Sub", "new_tokens.place", self._lengths, new)

    @cached_property
    def end(self) -> ir.Value:
        """The place in the cache after each row's last column, int64 `[batch]`."""
        return self._build.op("Add", "new_tokens.end", self.start, self._width)

    @cached_property
    def positions(self) -> ir.Value:
        """The place of every new token, int64 `[batch, tokens]`; padding gets some place inside the rotary tables."""
        first = self._build.op("Unsqueeze", "positions.first", self.start, self._axes("axis_1", 1))
        return self._build.op("Add", "positions", first, self._columns)

    def kept(self, hidden: ir.Value) -> ir.Value:
        """Select from `hidden` `[batch, tokens, dim]` the tokens that the head is to read, in the order of the caller's columns."""
        build = self._build
        wanted = build.optional_input(LOGITS_TO_KEEP, np.array(1, np.int64))
        everything = build.op("Equal", "kept.everything", wanted, self._zero)
        kept = build.op("Where", "kept.tokens", everything, self._width, wanted)
        first = build.op("Sub", "kept.first", self._width, kept)
        columns = build.op("Range", "kept.columns", first, self._width, self._one)
        # With padding on the right, the last tokens of a row stand left of the last columns.
        shift = build.op("Where", "kept.shift", everything, self._left, self._padding)
        shifted = build.op("Add", "kept.wrapped", build.op("Sub", "kept.unrolled", columns, shift), self._width)
        source = build.op("Unsqueeze", "kept.source", build.op("Mod", "kept.index", shifted, self._width), self._axes("axis_last", -1))
        return build.op("GatherND", "kept.hidden", hidden, source, batch_dims=1)

    def _scalar(self, name: str, value: int) -> ir.Value:
        return self._build.constant(name, np.array(value, np.int64))

    def _axes(self, name: str, value: int) -> ir.Value:
        return self._build.constant(name, np.array([value], np.int64))
