"""GPTQ: codes chosen so that the rounding errors of a row cancel in its output, for every scheme that has a grid.

With inputs of second moment H, rounding a row w to ŵ costs (w - ŵ)ᵀ H (w - ŵ) of mean squared output error. Column after column is rounded
to nearest after the errors made so far have been passed on to it, as far as the inputs are correlated (Frantar et al., "GPTQ", 2022, in the
form of LDLQ, Chee et al., "QuIP", 2023, which is equivalent and needs one Cholesky factor and no inverse). Then scales or tables are fitted
to the codes by least squares under H, and codes to the scales by coordinate descent, in turns; both only lower the error.

Scales are found before the first column is rounded, so columns may come in any order (that of their energy) while blocks stay as they lie.
Matrices in here are transposed, `[in, out]`: what is a column of the weight lies contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calibration.held_out import DEFAULT_PART
from calibration.second_moments import total, upper_factor
from elmexport.errors import ElmExportError
from elmexport.graph.device import product_dtype
from elmexport.quantization.codec import Quantized
from elmexport.quantization.grids import Grid
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import CodedScheme

_BLOCK = 64  # channels whose errors are passed on to each other one by one
# Channels whose errors are passed on to others together: products of few different shapes, for a library compiles each shape anew.
_PANEL = 256
_ATTEMPTS = 4  # at a Cholesky factor, each with ten times the damping of the one before


Damped = Callable[[float], None]  # called with a damping that had to be raised


def gptq(
    weight: Tensor, scheme: CodedScheme, hessian: Tensor, *, damping: float = DEFAULT_PART, rounds: int = 1, damped: Damped | None = None
) -> Quantized:
    """Compute the GPTQ codes of one matrix: `weight` `[out, in]`, any float dtype, in `scheme`, with `hessian` `[in, in]`.

    `hessian` is E[x xᵀ] of the linear's input. `damping`, a part of its mean diagonal, is added to the diagonal: it keeps the factor well
    conditioned, and rounding sensible where the calibration text says nothing (a channel that was always zero is rounded to nearest). It
    is raised tenfold, up to three times, where the matrix is not positive definite, and `damped` told. `rounds` is how often scales and codes are refitted.

    Raises:
        ElmExportError: the weight does not fit the scheme (see `quantize`), or the Hessian is not finite, of another size, or indefinite.
    """
    h = _checked(hessian, weight.shape[1])
    h, order, factor, needed = _damped(h, damping)
    if needed != damping and damped is not None:
        damped(needed)
    grid = quantize(weight, scheme, "mse", h.diagonal()).grid()
    w = weight.to(torch.float32).t().contiguous()
    gradient = _round_in_order(grid, w, factor, order)
    del factor
    products = h.to(product_dtype(h.device))
    for _ in range(rounds):
        error = _refit(grid, w, gradient, h, products)
        gradient = _descend(grid, w, error, h, products)
    if rounds:
        _refit(grid, w, gradient, h, products)
    return grid.result()


def output_error(error: Tensor, hessian: Tensor) -> float:
    """Compute the mean squared error of a linear's output, summed over the outputs: tr(E H Eᵀ) of the weight's error `[out, in]`."""
    return total((error @ hessian) * error)


def _round_in_order(grid: Grid, w: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """Round `w` `[in, out]`, its channels in `order`, each after adding what `factor`, R of R Rᵀ = H, passes on of the errors before.

    Returns H E of the errors E = w - values. With R = U √D, row i's target is w_i + Σ_{j<i} U_ji E_j, and what rounding leaves of it is
    (Uᵀ E)_i; so H E = R √D (Uᵀ E) is a product with a triangle.
    """
    size, dtype = factor.diagonal().contiguous(), product_dtype(w.device)
    channels, ordered = order.cpu().tolist(), w[order]
    feedback = (factor / size).to(dtype)
    known, left = (torch.empty_like(w, dtype=dtype) for _ in range(2))  # E, and √D (Uᵀ E), as products take them
    error = torch.empty_like(w[:_PANEL])
    for first in range(0, len(w), _PANEL):
        panel = slice(first, min(first + _PANEL, len(w)))
        targets = ordered[panel] + (feedback[:first, panel].t() @ known[:first])
        inside = factor[panel, panel] / size[panel]
        for start in range(0, len(targets), _BLOCK):
            block = slice(start, start + _BLOCK)
            target = targets[block].addmm_(inside[:start, block].t(), error[:start])
            for i in range(len(target)):
                row = start + i
                torch.sub(ordered[first + row], grid.round(channels[first + row], target[i]), out=error[row])
                target[i + 1 :].addr_(inside[row, row + 1 : start + len(target)], error[row])
        found = error[: len(targets)]
        known[panel] = found
        left[panel] = (targets - ordered[panel] + found) * size[panel, None]
    triangle, gradient = factor.to(dtype), torch.empty_like(w)
    for first in range(0, len(w), _PANEL):
        panel = slice(first, first + _PANEL)
        gradient[order[panel]] = (triangle[panel, first:] @ left[first:]).to(w.dtype)
    return gradient


def _descend(grid: Grid, w: Tensor, error: Tensor, h: Tensor, products: Tensor) -> Tensor:
    """Round every channel again to what is best beside all others' errors, the newest of each (coordinate descent, `error` is updated).

    Row i's target is w_i + Σ_{j≠i} H_ij E_j / H_ii. `products` is `h` in the dtype of products. Returns H E.
    """
    size, known = h.diagonal(), error.to(products.dtype)
    change, gradient = torch.empty_like(w), torch.empty_like(w)
    new = torch.empty_like(w[:_BLOCK])
    for first in range(0, len(w), _PANEL):
        panel = slice(first, min(first + _PANEL, len(w)))
        gradient[panel] = (products[panel] @ known).to(w.dtype)  # with the old errors from here on
        for start in range(first, panel.stop, _BLOCK):
            block = slice(start, min(start + _BLOCK, panel.stop))
            passed = gradient[block].addmm_(h[block, first:start], change[first:start])
            inside = h[block, block] / size[block]
            target = passed / size[block, None] - error[block] + w[block]
            for i, (exact, old, changed) in enumerate(zip(w[block], error[block], change[block], strict=True)):
                torch.sub(exact, grid.round(start + i, target[i]), out=new[i])
                torch.sub(new[i], old, out=changed)
                target[i + 1 :].addr_(inside[i, i + 1 :], changed)
            error[block] = new[: len(target)]
            gradient[first : block.stop].addmm_(h[first : block.stop, block], change[block])
        known[panel] = error[panel]
    known.copy_(change)
    for first in range(0, len(w), _PANEL):
        panel = slice(first, min(first + _PANEL, len(w)))
        gradient[panel] += products[panel, panel.stop :] @ known[panel.stop :]
    return gradient


def _refit(grid: Grid, w: Tensor, gradient: Tensor, h: Tensor, products: Tensor) -> Tensor:
    """Refit the grid's parameters to its codes by a step towards the least squares under `h`; returns the new errors.

    The normal equations differ from row to row (or group to group), and a product with `h` for all of them at once is the cheapest way to
    apply them. One step down `gradient` = H E, each parameter scaled by its own curvature, as far as is best for each system, takes nearly
    all that their solution would (within 0.3 % of the error on `tiny`).
    """
    slope = grid.reduce(gradient)
    squares = grid.squares(h.diagonal())
    direction = torch.where(squares > 0, slope / squares, 0.0)  # a parameter that no code uses stays as it is
    passed = (products @ grid.expand(direction).to(products.dtype)).to(w.dtype)
    curvature = (direction * grid.reduce(passed)).sum(0)
    rate = torch.where(curvature > 0, (direction * slope).sum(0) / curvature, 0.0)
    grid.set(grid.parameters + rate * direction)
    return w - grid.expand(grid.parameters)


def _checked(hessian: Tensor, columns: int) -> Tensor:
    if hessian.shape != (columns, columns):
        raise ElmExportError(f"a Hessian of shape {list(hessian.shape)} does not belong to a weight with {columns} input channels")
    h = hessian.to(torch.float32)
    if not torch.isfinite(h).all():
        raise ElmExportError(f"{int((~torch.isfinite(h)).sum())} of the Hessian's values are NaN or infinite; calibrate again")
    if (h.diagonal() < 0).any():
        raise ElmExportError("the Hessian has negative values on its diagonal, which no mean of squares has; calibrate again")
    return h


def _damped(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Damp and factor the Hessian H, divided by its mean diagonal.

    Returns H, the order of its diagonal (largest first), R, upper triangular, of R Rᵀ = H in that order, and the damping that it took.
    """
    mean = hessian.diagonal().mean()
    unit = torch.eye(len(hessian), device=hessian.device)
    h = unit if mean == 0 else hessian / mean
    order = h.diagonal().argsort(descending=True, stable=True)
    for _ in range(_ATTEMPTS):
        attempt = h + damping * unit
        factor = upper_factor(attempt, order)
        if factor is not None:
            return attempt, order, factor, damping
        damping *= 10
    raise ElmExportError(
        f"the Hessian is not positive definite, even with {damping / 10:g} of its mean diagonal added; calibrate again, on more text, or choose method 'mse'"
    )
