"""Look-up tables: our one-dimensional k-means against the exact one that coremltools ships, time and squared error on the same tensors.

    python benchmarks/kmeans_time.py [--rows 64] [--columns 2048] [--bits 4] [--group 8] [--json]

Both get groups of `--group` rows: normal, Laplace and Student-t (3 degrees) numbers, and rows of the embedded trained model, each plain and with
an importance for each column. `error` is our squared error over the exact optimum's. Times are wall clock and CPU (all threads) of one
process that does nothing else; ours uses every core, coremltools' one. The last row is ours alone on `--large` times as many rows, which is
what an export sees.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import report
from numpy.typing import NDArray

COLUMNS = {
    "weights": "{weights}",
    "importance": "{importance}",
    "millions": "{millions:.2f}",
    "ours s": "{ours_s:.3f}",
    "ours cpu s": "{ours_cpu_s:.3f}",
    "ours M/s": "{ours_rate:.2f}",
    "exact s": "{exact_s:.2f}",
    "exact M/s": "{exact_rate:.2f}",
    "error": "{error:.5f}",
    "450M on 2 cores, s": "{projected_s:.0f}",
}


def tensors(rows: int, columns: int) -> dict[str, NDArray[np.float32]]:
    from elmexport.checkpoint import open_checkpoint

    generator = np.random.default_rng(0)
    tiny = open_checkpoint("tiny").tensor("transformer.layers.5.ffn.proj_2.weight").float().numpy()
    return {
        "normal": generator.standard_normal((rows, columns), dtype=np.float32),
        "laplace": generator.laplace(size=(rows, columns)).astype(np.float32),
        "student-t": generator.standard_t(3, (rows, columns)).astype(np.float32),
        "tiny ffn.down": tiny[:rows],
    }


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float, float]:
    """The result, and the least wall clock and CPU time of `repeats` runs."""
    wall, cpu, result = [], [], None
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        result = run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return result, min(wall), min(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--large", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.disable(logging.WARNING)
    import torch
    from coremltools._deps import _kmeans1d

    from elmexport.quantization.kmeans import cluster

    entries, group = 1 << arguments.bits, arguments.group

    def ours(values: NDArray[np.float32], importance: NDArray[np.float32] | None) -> tuple[torch.Tensor, torch.Tensor]:
        return cluster(torch.from_numpy(values), entries, None if importance is None else torch.from_numpy(importance))

    def exact(values: NDArray[np.float32], weights: NDArray[np.float64] | None) -> float:
        total = 0.0
        for row in values:
            result = _kmeans1d.cluster(row, entries, weights=weights)
            squares = np.square(np.array(result.centroids, np.float16)[np.array(result.clusters)].astype(np.float64) - row)
            total += float((squares if weights is None else squares * weights).sum())
        return total

    rows = []
    for name, tensor in tensors(arguments.rows, arguments.columns).items():
        for weighted in (False, True):
            values = tensor.reshape(len(tensor) // group, -1)
            importance = np.random.default_rng(1).lognormal(size=tensor.shape[1]).astype(np.float32) if weighted else None
            weights = None if importance is None else np.tile(importance, group).astype(np.float64)
            (codes, tables), wall, cpu = timed(lambda v=values, i=importance: ours(v, i), 3)
            optimum, exact_s, _ = timed(lambda v=values, w=weights: exact(v, w), 1)
            squares = np.square(tables.double().gather(1, codes.long()).numpy() - values)
            found = float((squares if weights is None else squares * weights).sum())
            rows.append(row_of(name, weighted, values.size, wall, cpu, exact_s, found / optimum))
            print(f"{name}: done", file=sys.stderr)
    large = np.random.default_rng(2).standard_normal(
        (arguments.rows * arguments.large // group, group * arguments.columns), dtype=np.float32
    )
    _, wall, cpu = timed(lambda: ours(large, None), 3)
    rows.append(row_of("normal, large", False, large.size, wall, cpu, float("nan"), float("nan")))
    report("kmeans_time", rows, COLUMNS, as_json=arguments.json)


def row_of(name: str, weighted: bool, size: int, wall: float, cpu: float, exact_s: float, error: float) -> dict[str, Any]:
    return {
        "weights": name,
        "importance": "yes" if weighted else "no",
        "millions": size / 1e6,
        "ours_s": wall,
        "ours_cpu_s": cpu,
        "ours_rate": size / wall / 1e6,
        "exact_s": exact_s,
        "exact_rate": size / exact_s / 1e6,
        "error": error,
        "projected_s": 450e6 / size * cpu / 2,
    }


if __name__ == "__main__":
    main()
