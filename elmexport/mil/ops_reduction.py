"""MIL's reductions, norms and orderings: everything that goes through an axis. Sums run in float32 and are rounded once.

A function's parameters are the operation's; those annotated `Tensor` receive tensors, all others plain Python values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    """`axes` None is all of them; integers stay integers."""

    def operation(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        return function(x, list(range(x.ndim)) if axes is None else axes, keep_dims).to(x.dtype)

    return operation


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _argument(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def operation(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
        return function(x, axis, keepdim=keep_dims).to(torch.int32)

    return operation


def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True).to(torch.int32)


def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    """Always sorted, which `sort` false allows."""
    values, indices = torch.topk(x, x.shape[axis] if k == -1 else k, axis, largest=not ascending)
    return (values, indices.to(torch.int32)) if return_indices else values


def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    source = x.flip(axis) if reverse else x
    total = source.cumsum(axis).to(x.dtype)
    if exclusive:
        total = total - source
    return total.flip(axis) if reverse else total


def layer_norm(
    x: Tensor, axes: list[int] | None = None, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    over = sorted(axis % x.ndim for axis in axes) if axes is not None else list(range(x.ndim))
    centred = x - x.mean(over, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + epsilon)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    return _scaled(out, None if gamma is None else gamma.reshape(shape), None if beta is None else beta.reshape(shape))


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    centred = x - mean.reshape(shape)
    return _scaled(centred * torch.rsqrt(variance.reshape(shape) + epsilon), _per_channel(gamma, x), _per_channel(beta, x))


def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    over = list(range(2, x.ndim))
    centred = x - x.mean(over, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + epsilon)
    return _scaled(out, _per_channel(gamma, x), _per_channel(beta, x))


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three axes."""
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def _scaled(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else x * gamma
    return x if beta is None else x + beta


def _per_channel(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else vector.reshape(-1, *[1] * (x.ndim - 2))


OPS: Mapping[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "argsort": argsort,
    "batch_norm": batch_norm,
    "cumsum": cumsum,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "reduce_argmax": _argument(torch.argmax),
    "reduce_argmin": _argument(torch.argmin),
    "reduce_l1_norm": _reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_log_sum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "reduce_log_sum_exp": _reduction(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "reduce_max": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_mean": _reduction(lambda x, axes, keep: x.to(torch.float32).mean(axes, keepdim=keep)),
    "reduce_min": _reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_prod": _reduction(_prod),
    "reduce_sum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_sum_square": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "topk": topk,
}
