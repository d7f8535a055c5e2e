"""Matrix products of MLX's layers through numpy, for CPUs: MLX multiplies many tokens there more than ten times as slowly as a BLAS.

Weights are dequantized by MLX, a slice at a time; sums are in float32 either way. Experts' layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

# Tokens from which a product goes through numpy: more than are guessed at once, for a guess is to be rounded as a token alone is.
_ROWS = 33
_SLICE = 1 << 22  # values of a weight that are dequantized at a time


def multiply_by_numpy(model: Any) -> None:
    """Let the linear layers of `model`, and embeddings that are the head too, multiply through numpy."""
    kinds = _kinds()
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]


@cache
def _kinds() -> dict[type, type]:
    """Classes that take the place of mlx's."""
    from mlx import nn

    def quantized(layer: Any, rows: slice) -> Any:
        import mlx.core as mx

        biases = layer.get("biases")
        return mx.dequantize(
            layer["weight"][rows],
            scales=layer["scales"][rows],
            biases=None if biases is None else biases[rows],
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )

    def plain(layer: Any, rows: slice) -> Any:
        return layer["weight"][rows]

    def linear(base: Any, weight: Callable[[Any, slice], Any]) -> type:
        def call(layer: Any, x: Any) -> Any:
            return base.__call__(layer, x) if "bias" in layer or _few(x) else _product(layer, weight, x)

        return type(base.__name__, (base,), {"__call__": call})

    def embedding(base: Any, weight: Callable[[Any, slice], Any]) -> type:
        def as_linear(layer: Any, x: Any) -> Any:
            return base.as_linear(layer, x) if _few(x) else _product(layer, weight, x)

        return type(base.__name__, (base,), {"as_linear": as_linear})

    return {
        nn.Linear: linear(nn.Linear, plain),
        nn.QuantizedLinear: linear(nn.QuantizedLinear, quantized),
        nn.Embedding: embedding(nn.Embedding, plain),
        nn.QuantizedEmbedding: embedding(nn.QuantizedEmbedding, quantized),
    }


def _few(x: Any) -> bool:
    return bool(x.size // x.shape[-1] < _ROWS)


def _product(layer: Any, weight: Callable[[Any, slice], Any], x: Any) -> Any:
    import mlx.core as mx

    flat = np.asarray(x.astype(mx.float32)).reshape(-1, x.shape[-1])
    out = np.empty((len(flat), layer["weight"].shape[0]), np.float32)
    for rows in _slices(len(out[0]), x.shape[-1]):
        np.matmul(flat, np.asarray(weight(layer, rows).astype(mx.float32)).T, out=out[:, rows])
    return mx.array(out.reshape(*x.shape[:-1], -1))


def _slices(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, _SLICE // columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
