"""Unsigned codes of a few bits, packed tightly: code i of a row takes bits `i * width` and up of the row's bytes, low bits first."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor


def packs(width: int, columns: int) -> bool:
    """Whether rows of `columns` codes of `width` bits fill whole bytes, and fewer of them than one for each code."""
    return width < 8 and columns * width % 8 == 0


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack `codes` uint8 `[…, columns]`, each below `2 ** width`, to uint8 `[…, columns * width / 8]`."""
    count, size = _unit(width)
    words = torch.zeros((*codes.shape[:-1], codes.shape[-1] // count), dtype=torch.int64, device=codes.device)
    for i in range(count):
        words |= codes[..., i::count].to(torch.int64) << (width * i)
    return words[..., None].view(torch.uint8)[..., :size].flatten(-2).contiguous()


def unpack(packed: Tensor, width: int) -> Tensor:
    """The codes uint8 `[…, columns]` of `packed` uint8 `[…, columns * width / 8]`."""
    count, size = _unit(width)
    units = packed.reshape(*packed.shape[:-1], -1, size)
    words = torch.nn.functional.pad(units, (0, 8 - size)).contiguous().view(torch.int64)
    codes = words >> torch.arange(0, width * count, width, device=packed.device)
    return (codes & (1 << width) - 1).to(torch.uint8).flatten(-2)


def _unit(width: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and those bytes; at most 8 of each."""
    common = gcd(8, width)
    return 8 // common, width // common
