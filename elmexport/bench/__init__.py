"""Benchmark of artifacts on this machine: speed, load time and memory (`benchmark`).

Every measurement is a process of its own (`worker`), so that load time and peak memory are the artifact's alone. docs/benchmarking.md
defines the figures.
"""

from elmexport.bench.guesses import Guesses
from elmexport.bench.results import ArtifactResult, Benchmark, DecodeResult, Machine, PrefillResult, Summary
from elmexport.bench.rounds import benchmark
from elmexport.bench.workload import Workload

__all__ = ["ArtifactResult", "Benchmark", "DecodeResult", "Guesses", "Machine", "PrefillResult", "Summary", "Workload", "benchmark"]
