"""Output folder of a sweep: finished jobs by their keys, shared results, failures. It must be the same folder for every worker.

sweep.json           which sweep this is: workers look for it, to be sure that they see the folder
plan.toml            the plan that was run last
jobs.json            its jobs: what a report is to show
cells/KEY/           a finished cell: the artifact, eval-1.json …, bench.json, log.txt, result.json
references/KEY/      a finished reference
shared/              the cache of every job (`ELMEXPORT_CACHE`): weight sets, statistics, the references' answers
failures/KEY.txt     the log of a job that did not succeed, until it does
work/                what is running
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from elmexport.documents import parse_json, to_struct
from elmexport.errors import ElmExportError
from elmexport.files import check_writable, write_text
from elmexport.sweep.jobs import SCHEMA, Job, Kind, Result

MARKER, PLAN, JOBS, RESULT, LOG = "sweep.json", "plan.toml", "jobs.json", "result.json", "log.txt"
SHARED, WORK, FAILURES = "shared", "work", "failures"


class Marker(Struct, frozen=True):
    """`sweep.json`."""

    schema: int
    id: str


class JobName(Struct, frozen=True):
    """A job of the plan that was run last."""

    key: str
    kind: Kind
    label: str


def open_folder(out: Path, plan: str) -> str:
    """Make `out` the folder of a sweep, or find that it is one already; returns its identity. `plan` is the plan's text, kept in it.

    Raises:
        ElmExportError: something else lies there, or it cannot be written.
    """
    if out.is_dir() and not (out / MARKER).is_file() and any(out.iterdir()):
        raise ElmExportError(f"{out} holds something other than a sweep; choose another --out, or an empty folder")
    if out.exists() and not out.is_dir():
        raise ElmExportError(f"{out} is a file; --out is the folder of the sweep")
    check_writable(out / MARKER)
    try:
        for name in (*Kind, SHARED, WORK, FAILURES):
            (out / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ElmExportError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None
    if not (out / MARKER).is_file():
        write_text(out / MARKER, msgspec.json.encode(Marker(SCHEMA, uuid.uuid4().hex)).decode() + "\n")
    found = read_marker(out)
    write_text(out / PLAN, plan)
    return found.id


def is_sweep(path: Path) -> bool:
    """Whether `path` is the folder of a sweep."""
    return (path / MARKER).is_file()


def read_marker(out: Path) -> Marker:
    """Read `sweep.json`.

    Raises:
        ElmExportError: it is missing, damaged, or of a newer version.
    """
    fix = "give the folder that elmexport sweep wrote"
    try:
        text = (out / MARKER).read_bytes()
    except OSError as error:
        raise ElmExportError(f"cannot read {out / MARKER}: {error.strerror or error}; {fix}") from None
    found = to_struct(parse_json(text, str(out / MARKER), fix), Marker, str(out / MARKER), fix)
    if found.schema > SCHEMA:
        raise ElmExportError(f"{out / MARKER}: sweep of schema {found.schema}, this version reads up to {SCHEMA}; update elmexport")
    return found


def keep_jobs(out: Path, jobs: Sequence[Job]) -> None:
    """Write which jobs the plan has.

    Raises:
        ElmExportError: the folder cannot be written.
    """
    write_text(out / JOBS, msgspec.json.encode([JobName(job.key, job.kind, job.label) for job in jobs]).decode() + "\n")


def read_jobs(out: Path) -> list[JobName]:
    """Read which jobs the plan that was run last has.

    Raises:
        ElmExportError: the file is missing or damaged.
    """
    where, fix = out / JOBS, "run the sweep again"
    try:
        return to_struct(parse_json(where.read_bytes(), str(where), fix), list[JobName], str(where), fix)
    except OSError as error:
        raise ElmExportError(f"cannot read {where}: {error.strerror or error}; {fix}") from None


def is_done(out: Path, kind: Kind, key: str) -> bool:
    """Whether the job has been finished."""
    return (out / kind / key / RESULT).is_file()


def read_result(path: Path) -> Result:
    """Read the result of a finished job from its folder.

    Raises:
        ElmExportError: it is damaged, or of a newer version.
    """
    where, fix = path / RESULT, "remove that folder and run the sweep again"
    try:
        document = parse_json(where.read_bytes(), str(where), fix)
    except OSError as error:
        raise ElmExportError(f"cannot read {where}: {error.strerror or error}; {fix}") from None
    return to_struct(document, Result, str(where), fix)
