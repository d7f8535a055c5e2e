"""Second moments: sums of x xᵀ, of which one triangle of blocks is computed, then mirrored. That halves the cost of wide Hessians."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512  # columns computed at once; only blocks on and below the diagonal are
_PANEL = 128  # columns that are factored before the rest is told of them


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
    backwards = order.flip(0)
    lower = cholesky(moments[backwards][:, backwards])
    return None if lower is None else lower.flip(0, 1)


def cholesky(moments: Tensor) -> Tensor | None:
    """Factor `moments` `[width, width]` (float32, used up) as L Lᵀ, L lower triangular; None where it is not positive definite.

    Block by block, for LAPACK's own sums depend on the number of threads, and its one panel after the other keeps half of them waiting;
    products of matrices do neither.
    """
    width, threads = len(moments), torch.get_num_threads()
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        torch.set_num_threads(1)
        try:
            corner, failed = torch.linalg.cholesky_ex(moments[start:stop, start:stop])
        finally:
            torch.set_num_threads(threads)
        if failed:
            return None
        moments[start:stop, start:stop] = corner
        moments[start:stop, stop:] = 0
        if stop == width:
            break
        panel = torch.linalg.solve_triangular(corner, moments[stop:, start:stop].T, upper=False)
        moments[stop:, start:stop] = panel.T
        for column in range(stop, width, BLOCK):
            moments[column:, column : column + BLOCK].addmm_(
                moments[column:, start:stop], panel[:, column - stop : column - stop + BLOCK], alpha=-1
            )
    return moments


def total(products: Tensor) -> float:
    """Sum the values of a matrix, rows first: the same however many threads there are."""
    return float(products.sum(0).cpu().sum(dtype=torch.float64))  # not every device has float64
