"""MIL's operations that only move values: shapes, slices, gathers, fills. They are exact, and their results may be views of their inputs.

A function's parameters are the operation's; those annotated `Tensor` receive tensors, all others plain Python values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

Mask = list[bool] | None


def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if values[0].ndim == 0:
        return torch.stack(values)
    if interleave:
        axis %= values[0].ndim
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    if split_sizes is None:
        assert num_splits is not None
        split_sizes = [x.shape[axis] // num_splits] * num_splits
    return torch.split(x, split_sizes, axis)


def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """A 0 keeps the size of the axis that stands at the same place from the right."""
    sizes = [size or (x.shape[i - len(shape)] if len(shape) - i <= x.ndim else 1) for i, size in enumerate(shape)]
    return x.reshape(sizes)


def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes)


def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(prod(x.shape[: axis % x.ndim]), -1)


def identity(x: Tensor) -> Tensor:
    return x


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: Mask = None,
    end_mask: Mask = None,
    squeeze_mask: Mask = None,
) -> Tensor:
    view, _ = _slice(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return view


def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """A size of -1 reaches to the end."""
    for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
        start += x.shape[axis] if start < 0 else 0
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: Mask = None,
    end_mask: Mask = None,
    squeeze_mask: Mask = None,
) -> Tensor:
    return slice_update_(x.clone(), update, begin, end, stride, begin_mask, end_mask, squeeze_mask)


def slice_update_(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: Mask = None,
    end_mask: Mask = None,
    squeeze_mask: Mask = None,
) -> Tensor:
    """`slice_update` that writes into `x`; the executor uses it where nothing else can see `x` any more."""
    view, writable = _slice(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if not writable:
        raise ValueError("slice_update with a negative stride is not supported")
    if view.numel() != update.numel():
        raise ValueError(f"slice_update: the slice is {list(view.shape)}, the update {list(update.shape)}")
    view.copy_(update.reshape(view.shape))
    return x


def _slice(
    x: Tensor, begin: list[int], end: list[int], stride: list[int] | None, begin_mask: Mask, end_mask: Mask, squeeze_mask: Mask
) -> tuple[Tensor, bool]:
    """The slice, and whether it is a view. A squeezed axis takes the one element at `begin`."""
    view, squeezed = True, []
    for axis, size in enumerate(x.shape):
        step = stride[axis] if stride else 1
        start = None if begin_mask and begin_mask[axis] else begin[axis]
        if squeeze_mask and squeeze_mask[axis]:
            start = 0 if start is None else start
            x = x.narrow(axis, start + size if start < 0 else start, 1)
            squeezed.append(axis)
            continue
        indices = range(size)[slice(start, None if end_mask and end_mask[axis] else end[axis], step)]
        if step == 1:
            x = x.narrow(axis, indices.start, len(indices))
        elif step > 0:
            x = x[(slice(None),) * axis + (slice(indices.start, indices.stop, step),)]
        else:
            view, x = False, x.index_select(axis, torch.tensor(list(indices), dtype=torch.int32))
    return (x.squeeze(squeezed) if squeezed else x), view


def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.ndim)) if axes is None else axes)


def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """`x` at `indices` along `axis`. An index out of range is an error whether or not it is to be validated."""
    if batch_dims:
        rows = [gather(row, index, axis % x.ndim - 1, batch_dims - 1) for row, index in zip(x, indices, strict=True)]
        return torch.stack(rows)
    axis %= x.ndim
    flat = indices.reshape(-1)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)  # iOS 15 and 16 count from the end
    return x.index_select(axis, flat).reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    wide = indices.to(torch.int64)
    return torch.take_along_dim(x, torch.where(wide < 0, wide + x.shape[axis], wide), axis)


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    if batch_dims:
        return torch.stack([gather_nd(row, index, batch_dims - 1) for row, index in zip(x, indices, strict=True)])
    return x[tuple(indices.to(torch.int64).unbind(-1))]


def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """Modes that are exact: `update`, `max`, `min`."""
    wide = indices.to(torch.int64)
    if mode == "update":
        return data.scatter(axis, wide, updates)
    if mode not in ("max", "min"):
        raise ValueError(f"scatter_along_axis with mode {mode} is not supported; known: update, max, min")
    return data.scatter_reduce(axis, wide, updates, f"a{mode}")


def tile(x: Tensor, reps: list[int]) -> Tensor:
    return x.repeat(reps)


def fill(shape: list[int], value: Tensor | None = None) -> Tensor:
    return torch.zeros(shape) if value is None else value.reshape([1] * len(shape)).repeat(shape)


def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return fill(list(ref_tensor.shape), value)


def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """`pad` holds before and after of the last axes."""
    if mode == "constant":
        pairs = list(zip(pad[::2], pad[1::2], strict=True))
        return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"unknown mode {mode}")
    for axis, before, after in zip(range(-(len(pad) // 2), 0), pad[::2], pad[1::2], strict=True):
        size = x.shape[axis]
        places = torch.arange(-before, size + after)
        if mode == "reflect":  # about the edge, which is not repeated
            places = (size - 1) - ((size - 1) - places.abs()).abs()
        x = x.index_select(axis, places.clamp(0, size - 1))
    return x


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    x = x if lower < 0 else x.triu(-lower)
    return x if upper < 0 else x.tril(upper)


def one_hot(
    indices: Tensor, one_hot_vector_size: int, axis: int = -1, on_value: Tensor | None = None, off_value: Tensor | None = None
) -> Tensor:
    """An index out of range has no place to be on."""
    on, off = (torch.tensor(default) if value is None else value for value, default in ((on_value, 1), (off_value, 0)))
    axis %= indices.ndim + 1
    places = torch.arange(one_hot_vector_size).reshape(-1, *[1] * (indices.ndim - axis))
    return torch.where(indices.unsqueeze(axis) == places, on, off)


def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).to(torch.int32)


OPS: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "band_part": band_part,
    "concat": concat,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": fill_like,
    "flatten2d": flatten2d,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "identity": identity,
    "non_zero": non_zero,
    "one_hot": one_hot,
    "pad": pad,
    "reshape": reshape,
    "reverse": reverse,
    "scatter_along_axis": scatter_along_axis,
    "shape": shape,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
