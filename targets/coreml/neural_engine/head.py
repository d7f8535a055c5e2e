"""Outputs of the head: its parts as logits, or the most likely token of all.

The parts are not joined: the vocabulary is larger than the Neural Engine's largest dimension, so one operation on all logits would be left
to another unit. Whoever needs them side by side joins the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from coremltools.converters.mil.mil import Builder as mb

from elmexport.contracts.coreml import TOKEN, VALUE, logits_names
from targets.coreml.packing import Var


def logits(parts: Sequence[Var]) -> tuple[Var, ...]:
    """Logits: `logits` `[1, tokens, vocab]` from a head `[1, vocab, 1, tokens]`; from one in parts, `logits_0`, `logits_1`, …"""
    return tuple(_rows(part, name) for part, name in zip(parts, logits_names(len(parts)), strict=True))


def most_likely(parts: Sequence[Var]) -> tuple[Var, Var]:
    """Most likely token: `token` int32 and `value` fp16, both `[1, tokens]`.

    The value is the largest of the head's outputs, the token the first of those where several are.
    """
    first = _rows(parts[0])
    only = len(parts) == 1
    token = mb.reduce_argmax(x=first, axis=2, keep_dims=False, **_named(TOKEN, only))
    value = mb.reduce_max(x=first, axes=[2], keep_dims=False, **_named(VALUE, only))
    start = first.shape[2]
    for i, part in enumerate(parts[1:], start=1):
        rows, last = _rows(part), i == len(parts) - 1
        other = mb.reduce_max(x=rows, axes=[2], keep_dims=False)
        index = mb.add(x=mb.reduce_argmax(x=rows, axis=2, keep_dims=False), y=np.int32(start))
        token = mb.select(cond=mb.greater(x=other, y=value), a=index, b=token, **_named(TOKEN, last))
        value = mb.maximum(x=value, y=other, **_named(VALUE, last))
        start += rows.shape[2]
    return token, value


def _rows(part: Var, name: str | None = None) -> Var:
    """`[1, tokens, n]` of `[1, n, 1, tokens]`."""
    return mb.squeeze(x=mb.transpose(x=part, perm=[0, 3, 2, 1]), axes=[2], **_named(name, name is not None))


def _named(name: str | None, wanted: bool) -> dict[str, str]:
    return {"name": name} if wanted and name is not None else {}
