"""Plans in a folder of their own, and jobs that need no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from elmexport.sweep.cell import Planned
from elmexport.sweep.expansion import Expansion, expand
from elmexport.sweep.folder import open_folder
from elmexport.sweep.jobs import Job, Kind, Step
from elmexport.sweep.plan import read_plan
from tests.cli.conftest import run as run  # the fixture

LEAST = 'models = ["tiny"]\nformats = ["onnx", "gguf"]\nquants = ["int8", "int4"]\ntasks = ["cloze"]\nlimit = 20\n'
Expand = Callable[..., Expansion]
MakeJob = Callable[..., Planned]


@pytest.fixture
def expanded(tmp_path: Path) -> Expand:
    """`expanded(text)`: the jobs of a plan that lies in `tmp_path`, for the folder `tmp_path / "out"`."""

    def call(text: str) -> Expansion:
        path = tmp_path / "plan.toml"
        path.write_text(text, encoding="utf-8")
        return expand(read_plan(path), path, tmp_path / "out")

    return call


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """`make_job(key, code, …)`: a job in the sweep `tmp_path / "out"` whose only step is the Python program `code`."""

    def call(
        key: str,
        code: str | None = None,
        *,
        kind: Kind = Kind.CELL,
        after: str | None = None,
        groups: Sequence[str] = (),
        memory: int | None = None,
        packages: dict[str, str] | None = None,
    ) -> Planned:
        sweep = open_folder(tmp_path / "out", "")
        steps = () if code is None else (Step("run", ("-c", code)),)
        job = Job(key, f"job {key}", kind, str(tmp_path / "out"), steps, packages or {}, sweep=sweep, threads=1, memory=memory)
        return Planned(job, after, tuple(groups))

    return call


def python(*lines: str) -> str:
    """A program of several lines."""
    return "\n".join(lines)
