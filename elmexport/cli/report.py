"""`elmexport report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elmexport.cli.command import OUTPUT
from elmexport.cli.eval_options import (
    Against,
    Data,
    Fewshot,
    Limit,
    PresetName,
    Seed,
    Tasks,
    TextFile,
    TextTokens,
    TokenizerFile,
    settings,
)
from elmexport.cli.progress import Quiet, Verbose, note, progress_bar
from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    from elmexport.evaluation.results import Report


def report(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...", help="Reports that were stored as .json, and artifacts, which are evaluated; or the folder of a sweep."
        ),
    ],
    out: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Write a report: .html, .md or .json by its suffix, of a sweep .csv too. May be repeated.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    tasks: Tasks = None,
    preset: PresetName = None,
    fewshot: Fewshot = None,
    limit: Limit = None,
    seed: Seed = 0,
    against: Against = "fp16",
    data: Data = None,
    text: TextFile = None,
    text_tokens: TextTokens = 8192,
    tokenizer: TokenizerFile = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Add what the artifacts say to these prompts, a line each, to an .html report. bundled: elmexport's own.",
            rich_help_panel="Text",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Compare artifacts: size, quality, the worst items.

    Artifacts are evaluated with the options of elmexport eval. Answers to tasks that were given before are not asked for again. An --out
    file that is there already is replaced.

    \b
    Example:
      elmexport report tiny-onnx tiny-coreml stored.json --out compared.html
    """
    from elmexport.evaluation.completions import side_by_side
    from elmexport.evaluation.evaluate import evaluate
    from elmexport.evaluation.report.files import check_output, read_reports, to_json, write_reports
    from elmexport.evaluation.report.terminal import print_reports
    from elmexport.runtimes import artifact_kind
    from elmexport.sweep.folder import is_sweep

    sweeps = [path for path in sources if is_sweep(path)]
    if sweeps:
        if len(sources) > 1:
            raise ElmExportError(f"{sweeps[0]} is a sweep, which has a report of its own; name it alone")
        _refuse_options(context)
        _report_sweep(sweeps[0], out or (), json=json, quiet=quiet)
        return
    for path in out or ():
        check_output(path)
    stored = {path: read_reports(path) for path in sources if _is_stored(path)}  # what can fail at once comes before the minutes
    artifacts = [path for path in sources if path not in stored]
    for path in artifacts:
        artifact_kind(path)
    if not artifacts:
        _refuse_options(context)
    asked = None if prompts is None else _asked(prompts, out or ())
    chosen = settings(tasks, preset, fewshot, limit, seed, data, text, text_tokens)
    reports: list[Report] = []
    with progress_bar(quiet=quiet, verbose=verbose) as progress:
        for path in sources:
            if path in stored:
                reports += stored[path]
                continue
            reports.append(
                evaluate(
                    path,
                    chosen,
                    against=None if against == "none" else against,
                    tokenizer=tokenizer,
                    progress=progress,
                    note=lambda line, name=path.name: note(f"{name}: {line}", quiet=quiet),  # type: ignore[misc]
                )
            )
        said = None
        if asked is not None:
            reference = None if against == "none" else against
            said = side_by_side(artifacts, asked, against=reference, tokenizer=tokenizer, progress=progress)
    if json:
        typer.echo(to_json(reports), nl=False)
    else:
        print_reports(reports)
    for path in out or ():
        _write(path, lambda path: write_reports(reports, path, said), quiet=quiet)


def _report_sweep(folder: Path, out: Sequence[Path], *, json: bool, quiet: bool) -> None:
    from elmexport.evaluation.report.files import check_output, to_json
    from elmexport.evaluation.report.terminal import print_contents
    from elmexport.sweep.report.contents import sweep_contents
    from elmexport.sweep.report.files import FORMS, write_sweep
    from elmexport.sweep.results import read_sweep

    for path in out:
        check_output(path, FORMS)
    results = read_sweep(folder)
    if json:
        typer.echo(to_json(results.reports), nl=False)
    else:
        print_contents(sweep_contents(results))
    for path in out:
        _write(path, lambda path: write_sweep(results, path), quiet=quiet)


def _write(path: Path, write: Callable[[Path], None], *, quiet: bool) -> None:
    there = path.exists()
    write(path)
    if not quiet:
        typer.echo(f"{'replaced' if there else 'wrote'} {path}", err=True)


def _asked(prompts: Path, out: Sequence[Path]) -> list[str]:
    """
    Raises:
        ElmExportError: no prompts, or no page to show answers on.
    """
    from elmexport.runtimes.prompts import bundled_prompts, read_prompts

    if not any(path.suffix.lower() == ".html" for path in out):
        raise ElmExportError("--prompts adds a section to a page; give --out FILE.html, or use `elmexport compare`")
    return bundled_prompts() if str(prompts) == "bundled" else read_prompts(prompts)


def _is_stored(path: Path) -> bool:
    return path.suffix.lower() == ".json" and not path.is_dir()


def _refuse_options(context: typer.Context) -> None:
    """
    Raises:
        ElmExportError: an option of the evaluation was given, and nothing is to be evaluated.
    """
    for option in context.command.params:
        source = None if option.name is None else context.get_parameter_source(option.name)
        if source is not None and source.name == "COMMANDLINE" and option.name not in ("sources", "out", "json", "quiet", "verbose"):
            raise ElmExportError(
                f"{option.opts[0]} changes nothing: all that is compared was evaluated before; leave it out, or name artifacts"
            )
