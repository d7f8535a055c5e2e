"""Contents of a sweep's report: one table of all cells, with what is on a Pareto front marked, and one of their drops by task."""

from __future__ import annotations

from collections.abc import Sequence

from elmexport.errors import listed
from elmexport.evaluation.report.contents import Contents
from elmexport.evaluation.report.method import how_measured, made_by, notes
from elmexport.evaluation.report.pareto import pareto_front
from elmexport.evaluation.report.table import Cell, Column, Table, Tone, number_column
from elmexport.evaluation.report.wording import Finding, interval, megabytes, points, reading
from elmexport.sweep.report.figures import size
from elmexport.sweep.report.measures import Measure, measures
from elmexport.sweep.results import CellResult, SweepResults

_TONES = {Finding.WORSE: Tone.BAD, Finding.BETTER: Tone.GOOD}


def sweep_contents(results: SweepResults) -> Contents:
    """Contents of the report of a sweep."""
    done, missing = len(results.cells), len(results.missing)
    differences = [f"{missing} of {done + missing} cells are not finished: {listed(results.missing)}."] if missing else []
    reports = results.reports
    return Contents(
        title=f"Sweep of {done} cells",
        verdict=None,
        findings=(),
        facts=f"What quantization cost, of {', '.join(results.models)}.",
        artifacts=_cells(results),
        tasks=_drops(results.cells),
        scores=(),
        text=None,
        gates=None,
        differences=tuple(differences),
        notes=notes(reports),
        method=how_measured(reports),
        made_by=made_by(reports) if reports else "",
    )


def front(cells: Sequence[CellResult], measure: Measure) -> set[str]:
    """Keys of the cells that no other of the same model beats in both size and `measure`."""
    found = set()
    for model in dict.fromkeys(cell.facts.model for cell in cells):
        known = [
            (cell.key, float(bytes_), loss)
            for cell in cells
            if cell.facts.model == model and (bytes_ := size(cell)) is not None and (loss := measure.of(cell)) is not None
        ]
        found |= {known[i][0] for i in pareto_front([(bytes_, loss) for _, bytes_, loss in known])}
    return found


def _cells(results: SweepResults) -> Table:
    shown = measures(results)
    fronts = [front(results.cells, measure) for measure in shown]
    columns = [Column("model"), Column("recipe"), number_column("MB"), number_column("bits per weight", "bits")]
    columns += [number_column(f"{measure.name}, {measure.unit}", _short(measure)) for measure in shown]
    columns += [number_column(name) for name in _rates(results.cells)]
    rows = []
    for cell in results.cells:
        bytes_, bits = size(cell), None if cell.report is None else cell.report.artifact.bits_per_weight
        row = [Cell(cell.facts.model), Cell(cell.recipe)]
        row.append(Cell() if bytes_ is None else Cell(megabytes(bytes_), bytes_))
        row.append(Cell() if bits is None else Cell(f"{bits:.2f}", bits))
        for measure, best in zip(shown, fronts, strict=True):
            value = measure.of(cell)
            row.append(Cell() if value is None else Cell(measure.show(value), value, Tone.GOOD if cell.key in best else None))
        rates = rates_of(cell)
        row += [Cell(f"{rates[name]:.1f}", rates[name]) if name in rates else Cell() for name in _rates(results.cells)]
        rows.append(tuple(row))
    marked = "on the Pareto front: no other recipe of the model is better in both size and this"
    return Table("All cells", tuple(columns), tuple(rows), (), marked, sortable=True)


def _short(measure: Measure) -> str:
    return measure.name.replace("mean KL divergence on ", "KL, ").replace("mean drop over ", "mean of ")


def rates_of(cell: CellResult) -> dict[str, float]:
    """Tokens per second of a cell's benchmark, medians, by what was measured."""
    if cell.bench is None:
        return {}
    found = {f"prefill {one.tokens}, tokens/s": one.tokens_per_s.median for one in cell.bench.prefill}
    return found | {f"decode at {one.depth}, tokens/s": one.tokens_per_s.median for one in cell.bench.decode}


def _rates(cells: Sequence[CellResult]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in rates_of(cell)))


def _drops(cells: Sequence[CellResult]) -> Table | None:
    """Every drop with its interval, a line for each cell and task; None where no task was compared."""
    rows = []
    for cell in cells:
        for name, task in {} if cell.report is None else cell.report.tasks.items():
            compared = task.comparison
            if compared is not None and compared.drop is not None:
                ends = Cell() if compared.drop_ci is None else Cell(interval(compared.drop_ci))
                drop = Cell(points(compared.drop), compared.drop, _TONES.get(reading(task).finding))
                rows.append((Cell(cell.label), Cell(name), Cell(f"{task.n:,}", task.n), drop, ends))
    columns = (
        Column("cell"),
        Column("task"),
        number_column("items"),
        number_column("drop, points", "drop"),
        number_column("95 % interval"),
    )
    marked = "beyond noise: the 95 % interval excludes 0"
    return Table("Drops by cell and task", columns, tuple(rows), (), marked, sortable=True) if rows else None
