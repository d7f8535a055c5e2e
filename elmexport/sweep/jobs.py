"""Jobs of a sweep, and what became of them: what travels between the sweep, its workers and the folder. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from msgspec import Struct

SCHEMA = 1  # of the results in the folder; a reader refuses a newer one


class Kind(StrEnum):
    """Kinds of jobs, and the folders that hold what they leave."""

    REFERENCE = "references"  # the fp16 model's answers and distributions
    CELL = "cells"


class State(StrEnum):
    """States that a job ends in."""

    DONE = "done"
    FAILED = "failed"  # by itself: bad use, a check that failed, something that is not installed. The same would happen again
    CRASHED = "crashed"  # killed, out of memory, a worker that was lost, or a fault of the program: worth another attempt


class Step(Struct, frozen=True):
    """One program of a job: arguments of the Python interpreter, and the file that takes its standard output (None: the log)."""

    name: str
    arguments: tuple[str, ...]
    stdout: str | None = None


class CellFacts(Struct, frozen=True):
    """Description of a cell, recorded beside its results. `determinants`: all that its key is the hash of."""

    model: str  # the model's name
    format: str  # with settings, where there are any
    quant: str
    method: str
    artifact: str  # folder of the artifact in the cell's
    evaluations: tuple[str, ...]  # files, the first with the first text
    benchmark: str | None
    determinants: Mapping[str, Any]


class Job(Struct, frozen=True):
    """A job: steps that run one after the other in an empty folder, which becomes `folder/kind/key` when all have succeeded.

    `packages` are the versions that the worker must have. `threads` and `memory` (bytes): None where the worker's own share counts.
    """

    key: str
    label: str
    kind: Kind
    folder: str
    steps: tuple[Step, ...]
    packages: Mapping[str, str]
    facts: CellFacts | None = None
    sweep: str = ""  # identity of the sweep in the folder, by which a worker knows that it sees the right one
    threads: int | None = None
    memory: int | None = None


class Outcome(Struct, frozen=True):
    """Outcome of a job. `code` is the exit code of the step that ended it; `seconds` by step."""

    key: str
    state: State
    message: str = ""
    code: int | None = None
    seconds: Mapping[str, float] = {}
    peak_bytes: int = 0  # of all its processes together, memory of their own, sampled
    host: str = ""
    attempts: int = 1


class Result(Struct, frozen=True, kw_only=True):
    """`result.json` of a finished job: what it is, and how it went."""

    schema: int = SCHEMA
    label: str
    facts: CellFacts | None
    outcome: Outcome
