"""MIL's matrix products: linear, matmul, einsum, convolutions, attention. Products accumulate in float32 and are rounded once.

A function's parameters are the operation's; those annotated `Tensor` receive tensors, all others plain Python values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    kernel = weight.shape[2:]
    rank = len(kernel)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    if groups == 1 and prod(kernel) == 1 and x.shape[0] == 1 and prod(strides) == 1 and pad_type != "custom":
        # A projection: one matrix product, far faster than a general convolution. Places are the rows: with few of them, that order is
        # the faster one, and its result, transposed, is the next projection's operand as it lies.
        out = torch.mm(x.reshape(x.shape[1], -1).t(), weight.view(weight.shape[:2]).t())
        if bias is not None:
            out = out.add_(bias)
        return out.t().view(1, -1, *x.shape[2:])
    x = F.pad(x, _torch_pad(padding(pad_type, pad, x.shape[2:], kernel, strides, dilations)))
    return _CONVOLUTIONS[rank](x, weight, bias, strides, 0, dilations, groups)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """`custom` and `valid` padding: what an output shape of `(d - 1) * stride + kernel - pads` (or the one given) keeps."""
    rank = weight.ndim - 2
    if pad_type not in ("valid", "custom"):
        raise ValueError(f"pad_type {pad_type} of conv_transpose is not supported, only valid and custom")
    pad = pad if pad is not None and pad_type == "custom" else [0] * 2 * rank
    full = _TRANSPOSED[rank](x, weight, bias, strides or 1, 0, 0, groups, dilations or 1)
    for axis in range(rank):
        size = full.shape[axis + 2] - pad[2 * axis] - pad[2 * axis + 1] if output_shape is None else output_shape[axis + 2]
        full = full.narrow(axis + 2, pad[2 * axis], size)
    return full


def padding(
    pad_type: str, pad: list[int] | None, sizes: torch.Size, kernel: torch.Size | list[int], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    """Elements before and after each spatial axis. `same`: `ceil(size / stride)` positions come out, an odd one more after
    (`same_lower`: before)."""
    if pad_type == "custom":
        pad = pad or [0] * 2 * len(kernel)
        return list(zip(pad[::2], pad[1::2], strict=True))
    if pad_type == "valid":
        return [(0, 0)] * len(kernel)
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"unknown pad_type {pad_type}")
    pads = []
    for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (length - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if pad_type == "same" else (large, small))
    return pads


def _torch_pad(pads: list[tuple[int, int]]) -> list[int]:
    """As `F.pad` wants it: last axis first."""
    return [amount for pair in reversed(pads) for amount in pair]


def _pool_input(
    x: Tensor, kernel: list[int], strides: list[int] | None, pad_type: str, pad: list[int] | None, ceil_mode: bool, value: float
) -> tuple[Tensor, list[int]]:
    strides = strides or [1] * len(kernel)
    pads = padding(pad_type, pad, x.shape[2:], kernel, strides, [1] * len(kernel))
    if ceil_mode:
        pads = [
            (a, b + (-(size + a + b - length)) % stride)
            for (a, b), size, length, stride in zip(pads, x.shape[2:], kernel, strides, strict=True)
        ]
    return F.pad(x, _torch_pad(pads), value=value), strides


def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    padded, strides = _pool_input(x, kernel_sizes, strides, pad_type, pad, ceil_mode, -torch.inf)
    return {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel_sizes)](padded, kernel_sizes, strides)


def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel_sizes)]
    padded, stride = _pool_input(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    out = pool(padded, kernel_sizes, stride)
    if exclude_padding_from_average:
        share = pool(_pool_input(torch.ones_like(x), kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)[0], kernel_sizes, stride)
        out = out / share
    return out


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Written out: a row whose mask hides everything then gives what the formula gives."""
    scores = torch.matmul(query, key.mT) / query.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


OPS: Mapping[str, Callable[..., Tensor]] = {
    "avg_pool": avg_pool,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
    "max_pool": max_pool,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
