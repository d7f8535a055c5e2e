"""Weighted k-means in one dimension, for look-up tables, many groups at a time.

In one dimension a cluster is a run of sorted values, and its squared error follows from prefix sums. So a group is sorted once, and whatever
comes after costs little. Edges start where the point density is the one that is optimal in the limit of many entries, the cube root of the
values' density (Panter and Dite, 1951). Then dynamic programming (Wang and Song, "Ckmeans.1d.dp", 2011) finds the best combination of edges,
each among some places around where it is, and again until none moves: first among coarse places, then among all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmexport.quantization.threads import in_threads

_CHUNK = 1 << 18  # values handled at a time
_LONG = 1 << 17  # values of a group beyond which they are merged into runs that agree in their leading bits
_DROPPED_BITS = 12  # of float32, where values are merged: 11 bits of mantissa stay
_SAMPLES = 1024  # places of each of two kinds from which the density is estimated
_FINENESS = 6  # coarse places for each entry
_REACH = 20  # coarse places that an edge may move in one pass, either way
_PASSES = 4  # at most, of each kind

Array = NDArray[Any]


def cluster(values: Tensor, entries: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster the rows of `values` `[groups, n]`, any float dtype, by k-means.

    Gives codes uint8 `[groups, n]` and tables float16 `[groups, entries]`, ascending.

    Minimizes each group's squared error, weighted by `importance` `[columns]` where given, a group being whole rows of `columns` values.
    Each code is that of the entry nearest to its value, entries as stored. Near-exact: see `benchmarks/kmeans_time.py`.
    """
    groups, n = values.shape
    codes, tables = torch.empty((groups, n), dtype=torch.uint8), torch.empty((groups, entries), dtype=torch.float16)
    step = max(1, _CHUNK // n)
    weights = None if importance is None else importance.to(torch.float32).repeat(n // len(importance)).numpy()

    def work(start: int) -> None:
        part = slice(start, start + step)
        x = values[part].to(torch.float32)
        points, mass, moment = _sorted_sums(x.numpy(), weights)
        tables[part] = _solve(points, mass, moment, entries).to(torch.float16)
        _assign(x, tables[part].to(torch.float32), codes[part])

    in_threads(work, range(0, groups, step))
    return codes, tables


def boundaries(tables: Tensor) -> Tensor:
    """Midpoints between neighbouring entries, where the nearest one changes: float32 `[groups, entries - 1]` of ascending `tables`."""
    return (tables[:, 1:] + tables[:, :-1]) / 2


def _assign(x: Tensor, tables: Tensor, codes: Tensor) -> None:
    edges = boundaries(tables)
    for start in range(0, x.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        codes[:, part] = torch.searchsorted(edges, x[:, part], out_int32=True)


def _sorted_sums(x: Array, weights: Array | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted `points` `[g, m]`, and prefix sums float64 `[g, m + 1]` of their weights and of weight times value."""
    if weights is None:
        x = np.sort(x, axis=1)
        w = np.ones((1, 1), dtype=np.float32)
    else:
        x, w = _sort_pairs(x, np.broadcast_to(weights, x.shape))
    if x.shape[1] > _LONG:
        return _merged(x[0], np.broadcast_to(w, x.shape)[0])
    mass, moment = (np.zeros((len(x), x.shape[1] + 1)) for _ in range(2))
    np.cumsum(np.broadcast_to(w, x.shape), axis=1, dtype=np.float64, out=mass[:, 1:])
    np.cumsum(x if weights is None else x * w, axis=1, dtype=np.float64, out=moment[:, 1:])
    return torch.from_numpy(x), torch.from_numpy(mass), torch.from_numpy(moment)


def _sort_pairs(x: Array, weights: Array) -> tuple[Array, Array]:
    """Each row of `x` sorted, its weights with it: one sort of 64-bit keys, value above weight, several times faster than argsort."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    keys = _ordered(bits).astype(np.uint64) << np.uint64(32) | np.ascontiguousarray(weights).view(np.uint32)
    keys.sort(axis=1)
    high = (keys >> np.uint64(32)).astype(np.uint32)
    negative = high < 0x80000000
    value = np.where(negative, ~high, high & np.uint32(0x7FFFFFFF)).view(np.float32)
    return value, (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)


def _ordered(bits: Array) -> Array:
    """Bits of float32 as unsigned integers in the order of the numbers."""
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(0x80000000))


def _merged(x: Array, w: Array) -> tuple[Tensor, Tensor, Tensor]:
    """As `_sorted_sums` for one sorted row, values that agree but for `_DROPPED_BITS` taken as one (their sums stay exact)."""
    keys = _ordered(x.view(np.uint32)) >> np.uint32(_DROPPED_BITS)
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    mass = np.add.reduceat(w, starts, dtype=np.float64)
    moment = np.add.reduceat(x * w, starts, dtype=np.float64)
    points = (moment / np.where(mass > 0, mass, 1)).astype(np.float32)
    return (
        torch.from_numpy(points)[None],
        torch.from_numpy(np.concatenate(([0.0], np.cumsum(mass))))[None],
        torch.from_numpy(np.concatenate(([0.0], np.cumsum(moment))))[None],
    )


def _solve(points: Tensor, mass: Tensor, moment: Tensor, entries: int) -> Tensor:
    """Tables float64 `[g, entries]`, ascending, of the groups that the three describe (see `_sorted_sums`)."""
    # First among coarse places, evenly many to an entry: which part of the values gets how many entries.
    grid = _spread(points, mass, entries * _FINENESS)
    chosen = (torch.arange(entries + 1) * _FINENESS).expand(len(points), -1)
    w, s = mass.gather(1, grid), moment.gather(1, grid)
    chosen = _settled(chosen, w, s, torch.arange(-_REACH, _REACH + 1))
    # Then among all places.
    edges = grid.gather(1, chosen)
    powers = 1 << torch.arange(int(edges.diff(dim=1).max()).bit_length())
    edges = _settled(edges, mass, moment, torch.cat((-powers.flip(0), torch.zeros(1, dtype=torch.int64), powers)))
    last = points.shape[1] - 1
    unused = points.gather(1, edges[:, :-1].clamp(max=last)).to(torch.float64)
    return _centroids(edges, mass, moment, unused).sort(1).values


def _settled(edges: Tensor, mass: Tensor, moment: Tensor, offsets: Tensor) -> Tensor:
    """`edges` after `_moved` as often as it changes them, at most `_PASSES` times."""
    for _ in range(_PASSES):
        moved = _moved(edges, mass, moment, offsets)
        if torch.equal(moved, edges):
            break
        edges = moved
    return edges


def _spread(points: Tensor, mass: Tensor, parts: int) -> Tensor:
    """Edges `[g, parts + 1]` (indices into `points`, from 0 to m) that part them evenly under the cube root of their density."""
    m = points.shape[1]
    # Places evenly spaced by rank resolve the bulk of the values, places evenly spaced by value the tails.
    by_rank = torch.linspace(0, m - 1, min(m, _SAMPLES)).round().to(torch.int64).expand(len(points), -1)
    steps = torch.linspace(0, 1, _SAMPLES)
    by_value = torch.searchsorted(points, points[:, :1] + (points[:, -1:] - points[:, :1]) * steps).clamp(max=m - 1)
    samples = torch.cat((by_rank, by_value), 1).sort(1).values
    gaps = points.gather(1, samples).to(torch.float64).diff(dim=1)
    held = mass.gather(1, samples).diff(dim=1)
    # density^(1/3) dx = (held / gap)^(1/3) gap
    measure = torch.nn.functional.pad((held * gaps.square()).clamp(min=0).pow(1 / 3).cumsum(1), (1, 0))
    levels = measure[:, -1:] * torch.linspace(0, 1, parts + 1, dtype=torch.float64)[1:-1]
    inner = samples.gather(1, torch.searchsorted(measure, levels).clamp(max=samples.shape[1] - 1))
    ends = torch.zeros(len(points), 1, dtype=torch.int64)
    return torch.cat((ends, inner, ends + m), 1)


def _moved(edges: Tensor, mass: Tensor, moment: Tensor, offsets: Tensor) -> Tensor:
    """The best `edges` `[g, entries + 1]` of those that differ from the given ones by one of the `offsets` (0 in their middle) each."""
    m = mass.shape[1] - 1
    places = (edges[:, 1:-1, None] + offsets).clamp_(0, m)
    g, _, choices = places.shape
    ends = torch.zeros(g, 1, choices, dtype=torch.int64)
    places = torch.cat((ends, places, ends + m), 1)  # [g, entries + 1, choices]
    w, s = mass.gather(1, places.view(g, -1)).view(places.shape), moment.gather(1, places.view(g, -1)).view(places.shape)
    within = w[:, 1:, None, :] - w[:, :-1, :, None]
    # Squared error of the values from one edge to the next, up to a term that no choice changes; empty runs cost nothing.
    cost = (s[:, 1:, None, :] - s[:, :-1, :, None]).square_().div_(within).neg_()
    cost.masked_fill_(within == 0, 0.0).masked_fill_(within < 0, torch.inf)
    least, chosen = torch.zeros(g, choices, dtype=torch.float64), []
    for i in range(cost.shape[1]):
        least, came_from = (least[:, :, None] + cost[:, i]).min(1)
        chosen.append(came_from)
    at = chosen[-1].new_full((g, 1), choices // 2)  # all choices of the last edge are the same place
    best = [places[:, -1, :1]]
    for i in range(cost.shape[1] - 1, -1, -1):
        at = chosen[i].gather(1, at)
        best.append(places[:, i].gather(1, at))
    return torch.cat(best[::-1], 1)


def _centroids(edges: Tensor, mass: Tensor, moment: Tensor, otherwise: Tensor) -> Tensor:
    """Means of the runs between `edges`, float64; `otherwise` where a run weighs nothing."""
    w, s = mass.gather(1, edges).diff(dim=1), moment.gather(1, edges).diff(dim=1)
    return torch.where(w > 0, s / w, otherwise)
