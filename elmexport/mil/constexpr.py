"""Decompression of weights: MIL's `constexpr_*` operations in torch.

Integers come and go as int8 or uint8 tensors, floats as float32 tensors; rounding to a declared fp16 is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from elmexport.mil.blob import unpack

_SLICE = 1 << 18  # values dequantized at a time


def _blocked(tensor: Tensor, grid: Sequence[int]) -> Tensor:
    """`tensor` `[d0, d1, …]` as `[g0, d0/g0, g1, d1/g1, …]`."""
    return tensor.reshape([size for d, g in zip(tensor.shape, grid, strict=True) for size in (g, d // g)])


def _per_block(grid: Tensor) -> Tensor:
    """`grid` `[g0, g1, …]` as `[g0, 1, g1, 1, …]`, to go with `_blocked`."""
    return grid.reshape([size for g in grid.shape for size in (g, 1)])


def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Dequantize: `scale * (data - offset)`, one scale and offset for each block of `data`."""
    if data.ndim and 1 < len(scale) == len(data) and data.numel() > _SLICE:  # a few rows at a time, which stay in the cache
        out, rows = torch.empty(data.shape), max(1, _SLICE * len(data) // data.numel())
        for start in range(0, len(data), rows):
            part = slice(start, start + rows)
            out[part] = blockwise_shift_scale(data[part], scale[part], None if offset is None else offset[part])
        return out
    values = _blocked(data, scale.shape).to(torch.float32)
    if offset is not None:
        values = values - _per_block(offset.to(torch.float32))
    return values.mul_(_per_block(scale)).reshape(data.shape)


def affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor) -> Tensor:
    """Dequantize (iOS 16): `scale * (data - zero_point)`, both a scalar or a vector along `axis`."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    zero, factor = (value.to(torch.float32).reshape(shape if value.ndim else ()) for value in (zero_point, scale))
    return (quantized_data.to(torch.float32) - zero) * factor


def lut_to_dense(indices: Tensor, lut: Tensor, shape: Tensor | None = None, vector_axis: Tensor | None = None) -> Tensor:
    """Look indices up in tables (palettized weights).

    iOS 18: `lut` `[g0, g1, …, entries, vector]`, one table for each block of `indices`; vectors longer than one are laid along
    `vector_axis`. iOS 16 (`shape` given): one `lut` `[entries]`, `indices` packed bits.
    """
    if shape is not None:
        sizes, bits = shape.tolist(), len(lut).bit_length() - 1
        codes = indices.numpy() if bits == 8 else unpack(indices.numpy(), bits, prod(sizes))
        return lut[torch.from_numpy(codes[: prod(sizes)]).to(torch.int32)].reshape(sizes)
    *grid, entries, vector = lut.shape
    table = torch.arange(0, prod(grid) * entries, entries, dtype=torch.int32).reshape(grid)
    rows = (_blocked(indices, grid).to(torch.int32) + _per_block(table)).reshape(-1)
    if vector == 1:
        return lut.reshape(-1).index_select(0, rows).reshape(indices.shape)
    axis = int(vector_axis) % indices.ndim if vector_axis is not None else indices.ndim - 1
    entry = lut.reshape(-1, vector).index_select(0, rows).reshape(*indices.shape, vector)
    return entry.movedim(-1, axis + 1).flatten(axis, axis + 1)


def sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Tensor | None = None) -> Tensor:
    """Fill a sparse tensor: zeros but for `nonzero_data` where `mask` is 1; iOS 16 (`shape` given) packs the mask's bits."""
    if shape is not None:
        sizes = shape.tolist()
        mask = torch.from_numpy(unpack(mask.numpy(), 1, prod(sizes))).reshape(sizes)
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`lut_to_dense` of a sparse tensor that stays sparse: the mask and the nonzero values."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis=vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1 and vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], int(vector_axis))
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`blockwise_shift_scale` of a sparse tensor that stays sparse: the mask and the nonzero values."""
    return data_mask, blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)[data_mask != 0]


def cast(source_val: Tensor, output_dtype: Any = None) -> Tensor:
    """Cast stored fp16 to fp32, the one cast that MIL has here: values are float32 already."""
    return source_val


CONSTEXPR: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
