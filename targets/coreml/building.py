"""Small helpers for building MIL programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from coremltools.converters.mil.mil import Builder as mb

from targets.coreml.head_range import FP16_MAX
from targets.coreml.packing import Var


def times(x: Var, factor: float) -> Var:
    """Multiply, `x * factor`; no operation for a factor of 1."""
    return x if factor == 1.0 else mb.mul(x=x, y=np.float16(factor))


def held(x: Var, scale: float, **named: str) -> Var:
    """`x / scale` with magnitudes of at most fp16's largest number; no operation for a scale of 1 (see `targets.coreml.head_range`)."""
    if scale == 1.0:
        return x
    end = np.float16(FP16_MAX * scale)
    return mb.mul(x=mb.maximum(x=mb.minimum(x=x, y=end), y=np.float16(-end)), y=np.float16(1 / scale), **named)


@contextmanager
def fresh_names() -> Iterator[None]:
    """Number unnamed ops and constants from 0, so that a package's bytes do not depend on what was built before it."""
    before = mb.name_count
    mb.name_count = defaultdict(int)
    try:
        yield
    finally:
        mb.name_count = before
