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
from calibration.second_moments import upper_factor
from elmexport.errors import ElmExportError
from elmexport.quantization.codec import Quantized
from elmexport.quantization.grids import Grid
from elmexport.quantization.quantize import quantize
from elmexport.quantization.schemes import CodedScheme

_BLOCK = 64  # columns whose errors are passed on together
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

    feedback = factor / factor.diagonal()
    ordered = torch.zeros_like(w)
    _sweep(grid, w[order], ordered, feedback.fill_diagonal_(0), order, triangular=True)
    error = torch.empty_like(w)
    error[order] = ordered
    del ordered, factor
    feedback = h / h.diagonal()
    feedback.fill_diagonal_(0)
    natural = torch.arange(len(w), device=w.device)
    for _ in range(rounds):
        error = _refit(grid, w, error, h)
        _sweep(grid, w, error, feedback, natural)
    if rounds:
        _refit(grid, w, error, h)
    return grid.result()


def output_error(error: Tensor, hessian: Tensor) -> float:
    """Compute the mean squared error of a linear's output, summed over the outputs: tr(E H Eᵀ) of the weight's error `[out, in]`."""
    return float(((error @ hessian) * error).cpu().sum(dtype=torch.float64))  # not every device has float64


def _sweep(grid: Grid, w: Tensor, error: Tensor, feedback: Tensor, order: Tensor, *, triangular: bool = False) -> None:
    """Round each row of `w` `[in, out]` (input channel `order[i]`) to nearest after adding what `feedback` `[in, in]` passes on of the errors.

    Row i's target is w_i + Σ_j feedback_ji error_j, where `error` = w - values holds the newest (updated in place). `triangular`
    feedback comes from earlier rows only.
    """
    n = len(w)
    channels = order.cpu().tolist()
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        known = slice(0, start if triangular else n)
        target = torch.addmm(w[start:stop], feedback[known, start:stop].t(), error[known])
        inside = feedback[start:stop, start:stop]
        for i in range(stop - start):
            new = w[start + i] - grid.round(channels[start + i], target[i])
            # Of the block's own errors the product above held the old ones.
            target[i + 1 :].addr_(inside[i, i + 1 :], new - error[start + i])
            error[start + i] = new


def _refit(grid: Grid, w: Tensor, error: Tensor, h: Tensor) -> Tensor:
    """Refit the grid's parameters to its codes by a step towards the least squares under `h`; returns the new `error`.

    The normal equations differ from row to row (or group to group), and a product with `h` for all of them at once is the cheapest way to
    apply them. One step down the gradient, each parameter scaled by its own curvature, as far as is best for each system, takes nearly
    all that their solution would (within 0.3 % of the error on `tiny`).
    """
    gradient = grid.reduce(h @ error)
    squares = grid.squares(h.diagonal())
    direction = torch.where(squares > 0, gradient / squares, 0.0)  # a parameter that no code uses stays as it is
    curvature = (direction * grid.reduce(h @ grid.expand(direction))).sum(0)
    rate = torch.where(curvature > 0, (direction * gradient).sum(0) / curvature, 0.0)
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
