"""`elmexport sweep`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from elmexport.cli.command import OUTPUT
from elmexport.cli.progress import Quiet, Verbose, note, progress_bar
from elmexport.errors import ElmExportError

WORKERS = "Workers"  # heading on the help page


def sweep(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.toml", help="What to try; docs/sweeps.md describes it.")],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the sweep. What is finished there is not done again.", rich_help_panel=OUTPUT),
    ],
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Cells at a time on this machine, which share its cores and memory. [default: 1]",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run on the workers of this dask scheduler, tcp://HOST:PORT, which see DIR under the same path.",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Further attempts for a cell that crashed or lost its worker. Bad use is not tried again.",
            rich_help_panel=WORKERS,
        ),
    ] = 1,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the cells in their order, and what is left out, and run none.", rich_help_panel=OUTPUT),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export and evaluate every combination of a plan; resumable.

    Combinations are of models, formats, quantizations and methods. Each one, a cell, is an export and its evaluation in a process of its own; the
    fp16 reference of a model is evaluated once. A sweep that was interrupted goes on with the same command. Ends with exit code 1 if a cell
    failed; elmexport report DIR draws what there is.

    \b
    Example:
      elmexport sweep plan.toml --out sweep --workers 2
    """
    from elmexport.cli.sweep_progress import describe, print_failures, watched
    from elmexport.sweep.engine import local_client, local_threads, remote_client, run_jobs
    from elmexport.sweep.expansion import expand
    from elmexport.sweep.folder import is_done, keep_jobs, open_folder
    from elmexport.sweep.plan import read_plan

    if workers is not None and scheduler is not None:
        raise ElmExportError("--workers starts workers on this machine, --scheduler uses those of a cluster; leave one of them out")
    read = read_plan(plan)
    out = out.resolve()
    with progress_bar(quiet=quiet, verbose=verbose) as progress:
        expansion = expand(read, plan, out, progress)
    for line in expansion.notes:
        note(line, quiet=quiet)
    if dry_run:
        typer.echo(describe(expansion, out))
        return
    count = workers or 1
    threads = local_threads(count) if scheduler is None else None
    with contextlib.ExitStack() as stack:
        client = None
        if not all(is_done(out, each.job.kind, each.job.key) for each in expansion.jobs):
            client = stack.enter_context(local_client(count) if scheduler is None else remote_client(scheduler))
        jobs = expansion.assigned(open_folder(out, plan.read_text(encoding="utf-8")), threads)
        keep_jobs(out, [each.job for each in jobs])
        watch = stack.enter_context(watched(jobs, out, quiet=quiet, verbose=verbose))
        outcomes = {} if client is None else run_jobs(client, jobs, watch, retries=retries)
    if print_failures(jobs, outcomes, out):
        raise typer.Exit(1)
