"""The report of a sweep: tables, Pareto fronts, heat maps and CSV say what the cells' files hold."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elmexport.errors import ElmExportError
from elmexport.evaluation.report.files import read_reports
from elmexport.files import write_text
from elmexport.sweep.folder import keep_jobs, open_folder
from elmexport.sweep.jobs import CellFacts, Job, Kind, Outcome, Result, State
from elmexport.sweep.report.contents import front, sweep_contents
from elmexport.sweep.report.figures import sweep_figures
from elmexport.sweep.report.files import FORMS, write_sweep
from elmexport.sweep.report.measures import measures
from elmexport.sweep.results import read_sweep
from tests.cli.conftest import Run
from tests.evaluation.report import examples

# model, quant: size in MB, KL, damage of the items
CELLS: Mapping[tuple[str, str], tuple[float, float, float]] = {
    ("small", "int8"): (8.0, 0.001, 0.1),
    ("small", "int4"): (5.0, 0.02, 0.8),
    ("small", "int5"): (6.0, 0.03, 0.9),  # larger and worse than int4
    ("large", "int8"): (80.0, 0.0005, 0.1),
    ("large", "int4"): (50.0, 0.01, 0.5),
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A folder as a sweep of `CELLS` leaves it, and one more cell that is not finished."""
    out = tmp_path / "sweep"
    open_folder(out, "")
    jobs = []
    for number, ((model, quant), (megabytes, kl, damage)) in enumerate(CELLS.items()):
        job = Job(f"{number:020x}", f"{model} onnx {quant} mse", Kind.CELL, str(out), (), {})
        facts = CellFacts(model, "onnx", quant, "mse", f"{model}-onnx-{quant}", ("eval-1.json", "eval-2.json"), None, {})
        folder = out / "cells" / job.key
        folder.mkdir()
        for file, task, text, worse in (("eval-1.json", "arc_easy", "bundled prose", 1), ("eval-2.json", "piqa", "notes.txt", 2)):
            document = _document(f"{model}-onnx-{quant}", quant, megabytes, worse * kl, damage, task, text)
            write_text(folder / file, json.dumps(document))
        result = Result(label=job.label, facts=facts, outcome=Outcome(job.key, State.DONE, seconds={"export": 2.0, "eval": 3.5}))
        write_text(folder / "result.json", msgspec.json.encode(result).decode())
        jobs.append(job)
    keep_jobs(out, [*jobs, Job("f" * 20, "large onnx int5 mse", Kind.CELL, str(out), (), {})])
    (out / "cells" / ("e" * 20)).mkdir()  # of another plan
    return out


def _document(label: str, quant: str, megabytes: float, kl: float, damage: float, task: str, text: str) -> dict[str, Any]:
    found = examples.document(label, damage, quant=quant, tasks=[task], kl=kl)
    found["artifact"]["bytes"] = int(megabytes * 1e6)
    for part in ("kl", "perplexity"):
        found[part]["text"] = f"{text}, the first 10 of 20 tokens"
    return found


def test_what_was_measured(sweep: Path) -> None:
    results = read_sweep(sweep)
    assert [(cell.facts.model, cell.facts.quant) for cell in results.cells] == list(CELLS)
    assert results.missing == ("large onnx int5 mse",) and results.models == ("small", "large")
    first = results.cells[0]
    assert (
        first.report is not None
        and list(first.report.tasks) == ["arc_easy", "piqa"]
        and list(first.texts) == ["bundled prose", "notes.txt"]
    )
    found = {measure.name: measure.of(first) for measure in measures(results)}
    assert list(found) == [
        *("mean KL divergence on bundled prose", "mean KL divergence on notes.txt"),
        *("drop on arc_easy", "drop on piqa", "mean drop over 2 tasks"),
    ]
    assert found["mean KL divergence on bundled prose"] == 0.001 and found["mean KL divergence on notes.txt"] == 0.002
    drops = [found["drop on arc_easy"], found["drop on piqa"]]
    assert found["mean drop over 2 tasks"] == pytest.approx(sum(drops) / 2)  # type: ignore[arg-type]


def test_fronts_are_of_each_model(sweep: Path) -> None:
    results = read_sweep(sweep)
    best = front(results.cells, measures(results)[0])
    assert [cell.label for cell in results.cells if cell.key not in best] == ["small onnx int5"]
    contents = sweep_contents(results)
    assert contents.artifacts is not None and contents.tasks is not None
    marked = [row[4].tone is not None for row in contents.artifacts.rows]
    assert marked == [cell.key in best for cell in results.cells]
    assert len(contents.tasks.rows) == 2 * len(CELLS)
    assert contents.differences == ("1 of 6 cells are not finished: large onnx int5 mse.",)


def test_figures(sweep: Path) -> None:
    figures = sweep_figures(read_sweep(sweep))
    maps, fronts = figures[:5], figures[5:]
    assert len(fronts) == 2 * 5 and fronts[0].caption.startswith("small, mean KL divergence on bundled prose. ")
    drawn = str(maps[0].drawings[0])
    assert drawn.count("<rect") == 3 * 2 and "onnx int5, large: not measured" in drawn and "onnx int4, small: 0.0200" in drawn
    assert [[cell.text for cell in row] for row in maps[0].tables[0].rows] == [
        ["onnx int8", "0.00100", "0.000500"],
        ["onnx int4", "0.0200", "0.0100"],
        ["onnx int5", "0.0300", ""],
    ]


def test_csv_holds_the_figures_unrounded(sweep: Path, tmp_path: Path) -> None:
    write_sweep(read_sweep(sweep), tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, ((model, quant), (megabytes, kl, _damage)), number in zip(rows, CELLS.items(), range(len(CELLS)), strict=True):
        assert (row["model"], row["quant"], row["format"], row["method"]) == (model, quant, "onnx", "mse")
        assert (int(row["bytes"]), float(row["bundled prose.kl_mean"]), float(row["notes.txt.kl_mean"])) == (megabytes * 1e6, kl, 2 * kl)
        assert (row["seconds"], row["key"]) == ("5.5", f"{number:020x}")
        (report,) = read_reports(sweep / "cells" / row["key"] / "eval-2.json")
        comparison = report.tasks["piqa"].comparison
        assert comparison is not None and float(row["piqa.drop"]) == comparison.drop and float(row["piqa.n"]) == 100
        assert (sweep / row["artifact"]).parent.is_dir()


def test_the_command(run: Run, sweep: Path, tmp_path: Path) -> None:
    done = run("report", sweep, *(word for suffix in FORMS for word in ("--out", f"sweep{suffix}")))
    assert done.code == 0 and "Sweep of 5 cells" in done.out and "note: 1 of 6 cells are not finished" in done.out
    assert done.err.splitlines() == [f"wrote sweep{suffix}" for suffix in FORMS]
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "<h1>Sweep of 5 cells</h1>" in page and page.count("<svg") == 2 * 15
    assert "| small | onnx int8 |" in (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert len(read_reports(tmp_path / "sweep.json")) == len(json.loads(run("report", sweep, "--json").out)["reports"]) == 5
    run("report", sweep, "--limit", 5).refused("--limit changes nothing")
    run("report", sweep, tmp_path / "sweep.json").refused("is a sweep, which has a report of its own; name it alone")
    run("report", sweep, "--out", "sweep.pdf").refused("suffix '.pdf'", ".html, .md, .csv, .json")
    run("report", tmp_path / "sweep.json", "--out", "all.csv").refused("suffix '.csv'", ".html, .md, .json")


def test_damaged_folders(sweep: Path) -> None:
    result = sweep / "cells" / f"{1:020x}" / "result.json"
    result.write_text("{")
    with pytest.raises(ElmExportError, match=r"result\.json is not JSON .*; remove that folder and run the sweep again"):
        read_sweep(sweep)
    result.unlink()
    assert read_sweep(sweep).missing == ("small onnx int4 mse", "large onnx int5 mse")
    (sweep / "jobs.json").unlink()
    with pytest.raises(ElmExportError, match=r"cannot read .*jobs\.json: No such file or directory; run the sweep again"):
        read_sweep(sweep)
    (sweep / "sweep.json").write_text('{"schema": 99, "id": "x"}')
    with pytest.raises(ElmExportError, match="sweep of schema 99, this version reads up to 1; update elmexport"):
        read_sweep(sweep)
