"""CSV of a sweep, a line for each cell: for spreadsheets and pandas. Figures are as measured, not rounded."""

from __future__ import annotations

import csv
import io

from elmexport.sweep.report.contents import rates_of
from elmexport.sweep.report.figures import size
from elmexport.sweep.results import CellResult, SweepResults


def sweep_csv(results: SweepResults) -> str:
    """Render the cells as CSV; columns of tasks and texts begin with their names, those that a cell has not are empty."""
    rows = [_row(cell, results) for cell in results.cells]
    columns = dict.fromkeys(name for row in rows for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _row(cell: CellResult, results: SweepResults) -> dict[str, str | int | float | None]:
    facts, report = cell.facts, cell.report
    row: dict[str, str | int | float | None] = {
        "model": facts.model,
        "format": facts.format,
        "quant": facts.quant,
        "method": facts.method,
        "bytes": size(cell),
        "bits_per_weight": None if report is None else report.artifact.bits_per_weight,
    }
    for name, text in cell.texts.items():
        if text.kl is not None:
            low, high = text.kl.mean_ci
            row |= {f"{name}.kl_mean": text.kl.mean, f"{name}.kl_low": low, f"{name}.kl_high": high}
            row |= {f"{name}.kl_p99": text.kl.p99, f"{name}.top1_agreement": text.kl.top1_agreement}
        row |= {f"{name}.perplexity": text.perplexity.value, f"{name}.perplexity_ratio": text.perplexity.ratio}
    for name, task in {} if report is None else report.tasks.items():
        row |= {f"{name}.n": task.n, f"{name}.{task.metric}": task.metrics[task.metric]}
        if task.comparison is not None:
            low_, high_ = task.comparison.drop_ci or (None, None)
            row |= {f"{name}.reference": task.comparison.reference[task.metric], f"{name}.drop": task.comparison.drop}
            row |= {f"{name}.drop_low": low_, f"{name}.drop_high": high_}
    row |= rates_of(cell)
    row |= {"seconds": sum(cell.outcome.seconds.values()), "peak_bytes": cell.outcome.peak_bytes, "host": cell.outcome.host}
    return row | {"key": cell.key, "artifact": str((cell.folder / facts.artifact).relative_to(results.folder))}
