"""`elmexport calibrate`."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elmexport.cli.command import MODEL, OUTPUT
from elmexport.cli.describe import print_json, size, table
from elmexport.cli.progress import Quiet, Verbose, note, progress_bar
from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    from calibration.calibrate import CalibrationResult


class Dataset(StrEnum):
    """The values of --dataset."""

    BUNDLED = "bundled"


def calibrate(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|ID|PATH",
            help="A name from `elmexport models`, a hub id, a checkpoint folder, or a CoreNet .pt file.",
            rich_help_panel=MODEL,
        ),
    ] = "tiny",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="UTF-8 text to read, like what the model will read in use. May be repeated.", rich_help_panel="Text"
        ),
    ] = None,
    dataset: Annotated[
        Dataset | None,
        typer.Option(
            help="Text that comes with elmexport, instead of --text: public-domain prose. [default: bundled]", rich_help_panel="Text"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to read.", rich_help_panel="Text")] = 32768,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Tokens that are read together, BOS included. [default: 512, or the model's maximum]",
            rich_help_panel="Text",
        ),
    ] = None,
    hessian: Annotated[
        bool,
        typer.Option(
            "--hessian", help="Measure full second moments too, which GPTQ needs: slower, and a large file.", rich_help_panel=OUTPUT
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write. [default: ./MODEL-calibration.safetensors]", rich_help_panel=OUTPUT)
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.gguf", help="Write llama.cpp's importance matrix too, for llama-quantize --imatrix.", rich_help_panel=OUTPUT
        ),
    ] = None,
    random_weights: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="SEED",
            help="Measure the model's shapes with random weights, to try speed without a download.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|ID",
            help="tokenizer.model or tokenizer.json, or a folder or hub id that has one. [default: found with the model]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a model on the hub. [default: main]", rich_help_panel=MODEL)
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Adapter (LoRA or DoRA, as PEFT or CoreNet writes it) to merge into the model's weights.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are already there.", rich_help_panel=OUTPUT)] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a summary.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Measure what a model's layers read, for better quantization.

    Reads a text with the model, layer by layer, and writes a statistics file for later exports. If it is interrupted, the same command
    goes on from where it stopped.

    \b
    Example:
      elmexport calibrate --model 450M --text prompts.txt --out 450M.safetensors
    """
    from calibration.calibrate import calibrate as library_calibrate
    from calibration.calibrate import check_output

    if text and dataset is not None:
        raise ElmExportError(f"--text and --dataset {dataset} exclude each other; leave one of them out")
    if imatrix is not None:
        check_output(imatrix, force=force)
    start = time.monotonic()
    with progress_bar(quiet=quiet, verbose=verbose) as progress:
        result = library_calibrate(
            model,
            out=out,
            hessian=hessian,
            force=force,
            random_weights=random_weights,
            tokenizer=tokenizer,
            revision=revision,
            adapter=adapter,
            progress=progress,
            text=text or (),
            tokens=tokens,
            window=window,
        )
    if imatrix is not None:
        from elmexport.importance import write_importance

        write_importance(result.statistics, result.checkpoint.config, imatrix)
    for line in result.notes:
        note(line, quiet=quiet)
    facts = _facts(result, imatrix, time.monotonic() - start)
    if json:
        print_json(facts)
    else:
        typer.echo(table(_summary(facts)))


def _facts(result: CalibrationResult, imatrix: Path | None, seconds: float) -> dict[str, Any]:
    from calibration.residual import choose_alpha

    facts, peak = result.statistics.facts, result.statistics.residual_peak
    assert peak is not None
    return {
        "path": str(result.path),
        "bytes": result.path.stat().st_size,
        "imatrix": None if imatrix is None else str(imatrix),
        "model": {"name": facts.model, "identity": facts.identity},
        "text": {"words": facts.text, "sha256": facts.text_sha256, "tokens": facts.tokens, "window": facts.window},
        "hessian": facts.hessian,
        "residual_peak": peak,
        "residual_peaks": list(facts.residual_peaks),
        "alpha": choose_alpha(peak),
        "routed_tokens": result.statistics.routed(result.checkpoint.specs.values()),
        "outliers": [{"weight": name, "ratio": ratio} for name, ratio in result.statistics.outliers()],
        "seconds": round(seconds, 1),
    }


def _summary(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    text, peaks = facts["text"], facts["residual_peaks"]
    layer = peaks.index(facts["residual_peak"])
    where = "after the embedding" if layer == 0 else f"in layer {layer - 1}"
    scale = "fp16 needs no residual scale" if facts["alpha"] == 1 else f"fp16 exports scale it by {facts['alpha']:g}"
    kind = "mean squares, magnitudes, and full second moments" if facts["hessian"] else "mean squares and magnitudes"
    rows: list[tuple[str, ...]] = [
        ("model", facts["model"]["name"]),
        ("text", f"{text['words']}: {text['tokens']:,} tokens in windows of {text['window']}"),
        ("measured", f"{kind} of the inputs of {len(facts['outliers'])} matrices"),
        ("residual peak", f"{facts['residual_peak']:,.4g} {where}; {scale}"),
    ]
    rows += [("largest channel", f"{o['ratio']:.1f} times the average, in {o['weight']}") for o in facts["outliers"][:3]]
    rows += [(f"experts, layer {number}", _histogram(counts)) for number, counts in facts["routed_tokens"].items()]
    rows.append(("time", f"{facts['seconds']:.1f} s"))
    if facts["imatrix"]:
        rows.append(("imatrix", facts["imatrix"]))
    return [*rows, ("path", f"{facts['path']}, {size(facts['bytes'])}")]


def _histogram(counts: list[int]) -> str:
    """Bars of the tokens that went to each expert, as high as their part of the most, and the two ends."""
    bars, most = "▁▂▃▄▅▆▇█", max(counts)
    drawn = "".join(bars[-(-count * len(bars) // max(most, 1)) - 1] if count else " " for count in counts)
    fewest = min(counts)
    return f"{drawn}  {fewest:,} tokens (expert {counts.index(fewest)}) to {most:,} (expert {counts.index(most)})"
