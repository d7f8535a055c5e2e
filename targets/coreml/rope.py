"""Rotary embedding: tables of cosines and sines, and their use."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from numpy.typing import NDArray
from torch import Tensor

from elmexport.graph.ir import Graph
from elmexport.graph.ops import rope_angles
from targets.coreml.packing import Var


class RotaryTables:
    """Cosines and sines of every position of the context, computed once in float64, given as fp16 `[1, 1, context, head_dim]`."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def cosines(self, scale: float = 1.0) -> NDArray[np.float16]:
        return _halves(self._angles[0] * scale)

    def sines(self, scale: float = 1.0) -> NDArray[np.float16]:
        """The first half is negated, as `rotate` wants it."""
        return _halves(self._angles[1] * scale)

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        head_dim = self._graph.dims.head_dim
        cosines, sines = rope_angles(torch.arange(self._graph.context), head_dim, self._graph.rope_theta, torch.float64)
        sines[:, : head_dim // 2] *= -1
        return cosines, sines


def rotate(x: Var, cosines: Var, sines: Var) -> Var:
    """Rotate the heads `x` `[1, heads, tokens, head_dim]` (rotate-half) by rows `[1, 1, tokens, head_dim]` of the tables.

    The first half of `sines` is negated, so that the halves of `x` need only change places.
    """
    first, second = mb.split(x=x, num_splits=2, axis=3)
    return mb.add(x=mb.mul(x=x, y=cosines), y=mb.mul(x=mb.concat(values=[second, first], axis=3), y=sines))


def _halves(table: Tensor) -> NDArray[np.float16]:
    halves: NDArray[np.float16] = table.to(torch.float16).numpy()[None, None]
    return halves
