"""Small helpers for building MIL programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from coremltools.converters.mil.mil import Builder as mb

from targets.coreml.packing import Var


def times(x: Var, factor: float) -> Var:
    """Multiply, `x * factor`; no operation for a factor of 1."""
    return x if factor == 1.0 else mb.mul(x=x, y=np.float16(factor))


@contextmanager
def fresh_names() -> Iterator[None]:
    """Number unnamed ops and constants from 0, so that a package's bytes do not depend on what was built before it."""
    before = mb.name_count
    mb.name_count = defaultdict(int)
    try:
        yield
    finally:
        mb.name_count = before
