"""The figures of a benchmark, and the JSON document that they make; docs/benchmarking.md describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import msgspec
from msgspec import Struct

SCHEMA = 1


class Summary(Struct, frozen=True):
    """Median and range of one figure over all runs."""

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


class PrefillResult(Struct, frozen=True):
    """Prefill speed: a prompt of `tokens` read into an empty cache.

    `ratio`: to the first artifact's median, None where that did not measure the same.
    """

    tokens: int
    tokens_per_s: Summary
    ratio: float | None


class DecodeResult(Struct, frozen=True):
    """Decode speed: `tokens` one by one after `depth` tokens. `bytes_per_token` and `bandwidth_fraction` are None for bare model files."""

    depth: int
    tokens: int
    tokens_per_s: Summary
    ratio: float | None
    bytes_per_token: float | None
    bandwidth_fraction: float | None


class OwnLookup(Struct, frozen=True):
    """The same text by the engine's own prompt lookup, plainly and with guesses, in the same process."""

    how: str
    tokens_per_s: Summary
    plain_tokens_per_s: Summary
    speed_up: float


class SpeculationResult(Struct, frozen=True):
    """Speculative decoding of `tokens` of a repetitive text, and plain decoding of the same in the same process, greedily.

    `accepted` and `drafted` are of the last run; `speed_up` the ratio of the medians. `note`: why nothing was guessed. `own`: the engine's own
    lookup, where it has one.
    """

    how: str
    tokens: int
    tokens_per_s: Summary
    plain_tokens_per_s: Summary
    speed_up: float
    accepted: int
    drafted: int
    mean_accepted: float
    note: str | None
    own: OwnLookup | None = None


class ArtifactResult(Struct, frozen=True):
    """Benchmark of one artifact. Sizes in bytes; `note` says what the figures do not mean."""

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
    speculation: SpeculationResult | None = None  # None: not asked for


class Machine(Struct, frozen=True):
    """Machine of a benchmark; `packages` by name, null where one is not installed."""

    system: str
    cpus: int | None
    python: str
    packages: Mapping[str, str | None]


class Benchmark(Struct, frozen=True):
    """Benchmark of artifacts, in the order given. `bandwidth` in bytes per second, as read by `threads` threads between the runs."""

    machine: Machine
    threads: int
    repeat: int
    bandwidth: Summary
    artifacts: tuple[ArtifactResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"schema": SCHEMA, **msgspec.to_builtins(self)}


def benchmark_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `Benchmark.to_dict`: every key is present."""
    schema = msgspec.json.schema(Benchmark)
    for definition in schema["$defs"].values():
        definition |= {"required": list(definition["properties"]), "additionalProperties": False}
    whole = schema["$defs"]["Benchmark"]
    whole["properties"] = {"schema": {"const": SCHEMA}, **whole["properties"]}
    whole["required"].insert(0, "schema")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
