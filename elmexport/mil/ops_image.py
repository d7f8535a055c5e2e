"""MIL's operations on images: resizing by a factor, and moves between pixels and channels. Height and width are the last two axes.

A function's parameters are the operation's; those annotated `Tensor` receive tensors, all others plain Python values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        size = x.shape[axis]
        places = torch.arange(int(size * factor)) * size // int(size * factor)  # of a whole factor: each value so often
        x = x.index_select(axis, places)
    return x


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """`align_corners` and `half_pixel_centers` both false is the one combination that PyTorch has not."""
    if half_pixel_centers is not None and half_pixel_centers == align_corners:
        raise ValueError(f"upsample_bilinear with align_corners = half_pixel_centers = {align_corners} is not supported")
    size = [int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)]
    flat = x.reshape(1, -1, *x.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear", align_corners=align_corners).reshape(*x.shape[:-2], *size)


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


OPS: Mapping[str, Callable[..., Tensor]] = {
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
