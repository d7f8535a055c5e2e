"""`elmexport eval`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from elmexport.cli.command import MODEL, OUTPUT
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

GATES = "Gates"  # heading on the help page


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder, a bare .onnx, .mlpackage or .gguf, or a checkpoint folder.")],
    tasks: Tasks = None,
    preset: PresetName = None,
    fewshot: Fewshot = None,
    limit: Limit = None,
    seed: Seed = 0,
    against: Against = "fp16",
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Adapter that the artifact was exported with, to merge into the model it is compared with.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    data: Data = None,
    text: TextFile = None,
    text_tokens: TextTokens = 8192,
    tokenizer: TokenizerFile = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="Fail if a task loses more percentage points against the reference.", rich_help_panel=GATES),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS", help="Fail if the mean KL divergence from the reference, per token, is larger.", rich_help_panel=GATES
        ),
    ] = None,
    max_ppl_ratio: Annotated[
        float | None,
        typer.Option(metavar="X", help="Fail if perplexity is more than this multiple of the reference's.", rich_help_panel=GATES),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="An earlier report of this model: fail where the artifact is worse beyond noise.",
            rich_help_panel=GATES,
        ),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Write a report: .html, .md or .json by its suffix. May be repeated.", rich_help_panel=OUTPUT),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Write the gates as JUnit XML, for CI.", rich_help_panel=OUTPUT)
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Measure what the quantization cost, against the fp16 model.

    Accuracy, KL divergence, perplexity: runs lm-eval's tasks on the artifact and on its reference, item by item, and reads a text with both. By default the bundled task
    (cloze) and text, which need no download. Answers are kept, so that an interrupted evaluation goes on where it ended, and the reference
    is evaluated once. Ends with exit code 1 if a limit is passed.

    \b
    Example:
      elmexport eval tiny-onnx
      elmexport eval 270M-onnx --preset zero-shot --max-drop 2 --report out.html
    """
    from elmexport.evaluation.evaluate import evaluate as run
    from elmexport.evaluation.gates import Limits, check_gates, enforce
    from elmexport.evaluation.junit import write_junit
    from elmexport.evaluation.report.files import check_output, to_json, write_reports
    from elmexport.evaluation.report.terminal import print_reports
    from elmexport.evaluation.results import read_report
    from elmexport.files import check_writable

    limits = Limits(max_drop, max_kl, max_ppl_ratio)
    limits.check()  # what can fail at once comes before the minutes
    stored = None if baseline is None else read_report(baseline)
    for path in report or ():
        check_output(path)
    if junit is not None:
        check_writable(junit, "--junit")
    chosen = settings(tasks, preset, fewshot, limit, seed, data, text, text_tokens)
    with progress_bar(quiet=quiet, verbose=verbose) as progress:
        result = run(
            artifact,
            chosen,
            against=None if against == "none" else against,
            adapter=adapter,
            tokenizer=tokenizer,
            progress=progress,
            note=partial(note, quiet=quiet),
        )
    result = check_gates(result, limits, stored)
    for path in report or ():
        write_reports([result], path)
    if junit is not None:
        write_junit(result, junit)
    if json:
        typer.echo(to_json([result]), nl=False)
    else:
        print_reports([result])
    enforce(result)
