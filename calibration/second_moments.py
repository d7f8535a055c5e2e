"""Second moments: sums of x xᵀ, of which one triangle of blocks is computed, then mirrored. That halves the cost of wide Hessians."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512  # columns computed at once; only blocks on and below the diagonal are


def add_products(sums: Tensor, x: Tensor) -> None:
    """Add xᵀ x of the rows `x` `[rows, width]` to the blocks of `sums` `[width, width]` (float32) on and below the diagonal."""
    for start in range(0, x.shape[1], BLOCK):
        columns = slice(start, min(start + BLOCK, x.shape[1]))
        sums[start:, columns].addmm_(x[:, start:].T, x[:, columns])


def mirror(sums: Tensor) -> Tensor:
    """Fill the rest of what `add_products` made, in place: `sums` is then exactly symmetric."""
    width = len(sums)
    for start in range(0, width, BLOCK):  # block by block: the largest one is too large to copy
        stop = min(start + BLOCK, width)
        block = sums[start:stop, start:stop]
        block.copy_(torch.tril(block) + torch.tril(block, -1).T)
        sums[start:stop, stop:] = sums[stop:, start:stop].T
    return sums


def upper_factor(moments: Tensor, order: Tensor) -> Tensor | None:
    """Factor `moments` `[width, width]`, its channels in `order`, as R Rᵀ, R upper triangular; None where it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(moments[order][:, order].flip(0, 1))
    return None if failed else lower.flip(0, 1)
