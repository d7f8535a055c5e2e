"""Regularization chosen by held-out error: what one half of the calibration text fits, the other half judges.

Matrices in here are second moments: `hessian` `[in, in]` is E[x xᵀ] of a linear's input, `missing` `[out, in]` is E[y xᵀ] with what its output
lacks. What is added to a diagonal is a part of its mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.second_moments import cholesky, total, upper_factor

PARTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean diagonal, that may be added to it
DEFAULT_PART = 0.3  # where a text cannot be halved
_ROWS = 64  # outputs that judge a ridge
_PROBES = 64  # random vectors that estimate a trace


@dataclass(frozen=True)
class Half:
    """Second moments of one half of the windows, float32, on one device."""

    hessian: Tensor
    missing: Tensor


def choose_damping(first: Tensor, second: Tensor, start: float = DEFAULT_PART) -> float:
    """Choose GPTQ's damping: that of least expected error under the Hessian `second` of codes found under `first`, both `[in, in]`.

    Rounding leaves every column with an error of its own, all about as large; GPTQ passes it on by U, the unit upper triangular factor of the
    damped Hessian U D Uᵀ, so that the error of the matrix has the covariance U⁻ᵀ U⁻¹ and costs tr(U⁻¹ H U⁻ᵀ) under another H. `start` is where
    the search begins: the choice for a matrix like it saves factors.
    """
    return _least(lambda part: _expected_error(first, second, part), start)[0]


def fit(halves: Sequence[Half], start: float = DEFAULT_PART) -> tuple[Tensor | None, float]:
    """Fit C `[out, in]` that gives what outputs lack from their inputs, by ridge regression; None where it would not hold on other text.

    The ridge is the part of the diagonal with which either half's fit leaves the other half least error, searched from `start`; it is returned
    too. None if the error is no less than without a fit.
    """
    hessian, missing = mean_of([half.hessian for half in halves]), mean_of([half.missing for half in halves])
    if len(halves) < 2:
        return _ridge(hessian, missing, start), start
    rows = torch.linspace(0, len(missing) - 1, min(_ROWS, len(missing)), device=missing.device).long()
    part, cost = _least(lambda part: sum(_left(halves[i], halves[1 - i], rows, part) for i in range(2)), start)
    return (_ridge(hessian, missing, part) if cost < 0 else None), part


def mean_of(moments: Sequence[Tensor]) -> Tensor:
    """Mean of the moments of both halves, which count alike even where one has a window more."""
    return moments[0] if len(moments) == 1 else (moments[0] + moments[1]) / 2


def _least(cost: Callable[[float], float], start: float) -> tuple[float, float]:
    """Find the part of least cost, and that cost, downhill from `start`: costs have one valley."""
    costs: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in costs:
            costs[place] = cost(PARTS[place]) if 0 <= place < len(PARTS) else math.inf
        return costs[place]

    place = min(range(len(PARTS)), key=lambda i: abs(math.log(PARTS[i] / start)))
    while True:
        best = min((place, place - 1, place + 1), key=at)
        if best == place:
            return PARTS[place], at(place)
        place = best


def _left(seen: Half, other: Half, rows: Tensor, part: float) -> float:
    """What the fit of `seen` leaves on `other`, less what there was: tr(C H Cᵀ) - 2 tr(C Mᵀ)."""
    found = _ridge(seen.hessian, seen.missing[rows], part)
    return total((found @ other.hessian - 2 * other.missing[rows]) * found)


def _ridge(hessian: Tensor, missing: Tensor, part: float) -> Tensor:
    """C of C (H + λ) = `missing`, λ being `part` of the mean diagonal of H."""
    damped = hessian + part * float(hessian.diagonal().mean()) * torch.eye(len(hessian), device=hessian.device)
    factor = cholesky(damped.clone())
    if factor is None:  # more accurate, twice as slow
        factor = torch.linalg.cholesky(damped.cpu().to(torch.float64)).to(hessian.device, torch.float32)
    return torch.cholesky_solve(missing.T, factor).T


def _expected_error(first: Tensor, second: Tensor, part: float) -> float:
    """Estimate tr(U⁻¹ H U⁻ᵀ), the mean of zᵀ U⁻¹ H U⁻ᵀ z over vectors z of random signs (Hutchinson 1990); the same ones for every part."""
    order = first.diagonal().argsort(descending=True, stable=True)
    upper = upper_factor(first + part * float(first.diagonal().mean()) * torch.eye(len(first), device=first.device), order)
    if upper is None:
        return math.inf
    signs = torch.randint(2, (len(first), min(_PROBES, len(first))), generator=torch.Generator().manual_seed(0)).to(first) * 2 - 1
    errors = torch.linalg.solve_triangular((upper / upper.diagonal()).T, signs, upper=False, unitriangular=True)
    return total(second[order][:, order] @ errors * errors) / signs.shape[1]
