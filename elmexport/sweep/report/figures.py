"""Figures of a sweep: size against each measure, a plot for each model, and heat maps of recipes and models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from elmexport.evaluation.report.figures import WIDTHS, Figure, Loss, size_figure
from elmexport.evaluation.report.plots import heat_map
from elmexport.evaluation.report.table import Cell, Table, number_column
from elmexport.evaluation.report.table import Column as TableColumn
from elmexport.sweep.report.measures import Measure, measures
from elmexport.sweep.results import CellResult, SweepResults


def sweep_figures(results: SweepResults) -> list[Figure]:
    """Draw the figures of a sweep: the heat maps, then the Pareto fronts of each model."""
    found = measures(results)
    fronts = [_front(model, measure, results) for model in results.models for measure in found]
    return [*(_heat_map(measure, results) for measure in found), *(figure for figure in fronts if figure is not None)]


def _front(model: str, measure: Measure, results: SweepResults) -> Figure | None:
    cells = [cell for cell in results.cells if cell.facts.model == model]
    loss = Loss(measure.name, measure.unit, measure.values(cells), measure.show, measure.warning)
    return size_figure([cell.recipe for cell in cells], [size(cell) for cell in cells], loss, f"{model}, {measure.name}. ")


def size(cell: CellResult) -> int | None:
    """Size of a cell's artifact on disk, bytes; None where nothing measured it."""
    if cell.report is not None:
        return cell.report.artifact.bytes
    return None if cell.bench is None else cell.bench.file_bytes


def _heat_map(measure: Measure, results: SweepResults) -> Figure:
    models = results.models
    recipes = list(dict.fromkeys(cell.recipe for cell in results.cells))
    values = {(cell.recipe, cell.facts.model): measure.of(cell) for cell in results.cells}
    rows = [[_finite(values.get((recipe, model))) for model in models] for recipe in recipes]
    label = f"Heat map of {measure.name} in {measure.unit}, {len(recipes)} recipes by {len(models)} models. The table holds its figures."
    drawings = tuple(
        heat_map(recipes, models, rows, show=measure.show, width=width, label=label, class_=class_) for class_, width in WIDTHS
    )
    caption = f"{measure.name[0].upper()}{measure.name[1:]}, {measure.unit}: the darker, the larger the loss."
    return Figure(drawings, caption, (), (_table(measure, models, recipes, rows),))


def _table(measure: Measure, models: Sequence[str], recipes: Sequence[str], rows: Sequence[Sequence[float | None]]) -> Table:
    lines = tuple(
        (Cell(recipe), *(Cell() if value is None else Cell(measure.show(value), value) for value in row))
        for recipe, row in zip(recipes, rows, strict=True)
    )
    columns = (TableColumn("recipe"), *(number_column(model) for model in models))
    return Table(f"{measure.name}, {measure.unit}", columns, lines)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
