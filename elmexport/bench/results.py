"""The figures of a benchmark, and the JSON document that they make; docs/benchmarking.md describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Summary:
    """One figure over all runs."""

    median: float
    lowest: float
    highest: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[float]) -> Summary:
        return cls(median(runs), min(runs), max(runs), tuple(runs))

    @property
    def spread(self) -> float:
        """Highest less lowest, as a part of the median."""
        return (self.highest - self.lowest) / self.median


@dataclass(frozen=True)
class PrefillResult:
    """A prompt of `tokens` read into an empty cache. `ratio`: to the first artifact's median, None where that did not measure the same."""

    tokens: int
    tokens_per_s: Summary
    ratio: float | None


@dataclass(frozen=True)
class DecodeResult:
    """`tokens` decoded one by one after `depth` tokens. `bytes_per_token` and `bandwidth_fraction` are None for bare model files."""

    depth: int
    tokens: int
    tokens_per_s: Summary
    ratio: float | None
    bytes_per_token: float | None
    bandwidth_fraction: float | None


@dataclass(frozen=True)
class ArtifactResult:
    """One artifact. Sizes in bytes; `note` says what the figures do not mean."""

    path: str
    name: str
    target: str
    engine: str
    quant: str | None
    context: int
    file_bytes: int
    load_s: Summary
    before_bytes: int | None  # resident before the artifact was opened: Python and the engine
    peak_bytes: Summary
    prefill: tuple[PrefillResult, ...]
    decode: tuple[DecodeResult, ...]
    note: str | None


@dataclass(frozen=True)
class Benchmark:
    """All artifacts, in the order given. `bandwidth` in bytes per second, as read by `threads` threads between the runs."""

    machine: Mapping[str, Any]
    threads: int
    repeat: int
    bandwidth: Summary
    artifacts: tuple[ArtifactResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"schema": SCHEMA, **asdict(self)}
