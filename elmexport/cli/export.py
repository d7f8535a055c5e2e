"""Export command of a format: the options that all targets have in common, and the target's own."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from calibration.methods import DEFAULT, METHODS, methods_help
from elmexport.cli.command import MODEL, OUTPUT, QUANTIZATION
from elmexport.cli.describe import describe, print_json
from elmexport.cli.progress import Quiet, Verbose, note, progress_bar
from elmexport.cli.target_options import setting_values, target_options
from elmexport.target import Target

MethodName = StrEnum("MethodName", {name: name for name in METHODS})  # type: ignore[misc]  # the values of --method


def _calibrate(value: str) -> Literal["auto", "none"] | Path:
    if value == "auto":
        return "auto"
    return "none" if value == "none" else Path(value)


def command(target: type[Target]) -> Callable[..., None]:
    """Declare the command that exports to `target`, for typer."""

    def export(
        model: Annotated[
            str,
            typer.Option(
                metavar="NAME|ID|PATH",
                help="A name from `elmexport models`, a hub id, a checkpoint folder, or a CoreNet .pt file.",
                rich_help_panel=MODEL,
            ),
        ] = "tiny",
        quant: Annotated[
            str | None,
            typer.Option(
                metavar="QUANT|FILE",
                help="How weights are stored: see the list above, or a recipe of your own (.toml).",
                rich_help_panel=QUANTIZATION,
            ),
        ] = None,
        out: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Folder to write. [default: ./MODEL-TARGET-QUANT]", rich_help_panel=OUTPUT)
        ] = None,
        context: Annotated[
            int | None,
            typer.Option(
                min=1,
                metavar="TOKENS",
                help="Tokens that the artifact can attend to, prompt and answer together. [default: the model's maximum]",
                rich_help_panel=MODEL,
            ),
        ] = None,
        method: Annotated[
            MethodName,
            typer.Option(help=f"How codes are found. {methods_help()}.", rich_help_panel=QUANTIZATION),
        ] = MethodName[DEFAULT],
        calibrate: Annotated[
            str,
            typer.Option(
                metavar="auto|none|FILE",
                help="auto: measure the model's activations on a short text, to weight errors and to scale them to fit half precision, and quantize along a longer one where the method needs it; none: no weights, and a scale that is safe for most models; FILE: a text, statistics from `elmexport calibrate`, or llama.cpp's importance matrix (.gguf).",
                rich_help_panel=QUANTIZATION,
            ),
        ] = "auto",
        tokens: Annotated[
            int | None,
            typer.Option(
                min=1, metavar="TOKENS", help="How much of the calibration text to read. [default: 32768]", rich_help_panel=QUANTIZATION
            ),
        ] = None,
        bits_per_weight: Annotated[
            float | None,
            typer.Option(
                min=1,
                metavar="BITS",
                help="Let each matrix have the scheme that its sensitivity asks for, so many bits a parameter on average; writes recipe.toml into the artifact.",
                rich_help_panel=QUANTIZATION,
            ),
        ] = None,
        time_budget: Annotated[
            float | None,
            typer.Option(
                metavar="MINUTES", help="Time that --method auto may choose a method for. [default: 10]", rich_help_panel=QUANTIZATION
            ),
        ] = None,
        max_drop: Annotated[
            float | None,
            typer.Option(
                min=0,
                metavar="PP",
                help="Find the smallest such mix that loses at most so many percentage points of accuracy on the bundled cloze task; several tries, each measured.",
                rich_help_panel=QUANTIZATION,
            ),
        ] = None,
        weights_from: Annotated[
            Path | None,
            typer.Option(
                metavar="FILE",
                help="Take the codes from a file that --save-weights wrote, instead of computing them.",
                rich_help_panel=QUANTIZATION,
            ),
        ] = None,
        save_weights: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Keep the codes that --method gptq found.", rich_help_panel=QUANTIZATION)
        ] = None,
        random_weights: Annotated[
            int | None,
            typer.Option(
                min=0,
                metavar="SEED",
                help="Export the model's shapes with random weights, to try speed and size without a download.",
                rich_help_panel=MODEL,
            ),
        ] = None,
        tokenizer: Annotated[
            str | None,
            typer.Option(
                metavar="PATH|ID",
                help="tokenizer.model or tokenizer.json, a folder or hub id that has one, or none. [default: found with the model]",
                rich_help_panel=MODEL,
            ),
        ] = None,
        revision: Annotated[
            str | None,
            typer.Option(metavar="REV", help="Branch, tag or commit of a model on the hub. [default: main]", rich_help_panel=MODEL),
        ] = None,
        adapter: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR",
                help="Adapter (LoRA or DoRA, as PEFT or CoreNet writes it) to merge into the model's weights.",
                rich_help_panel=MODEL,
            ),
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.", rich_help_panel=OUTPUT)] = False,
        no_verify: Annotated[
            bool,
            typer.Option(
                "--no-verify",
                help="Skip the check that ends every export: running the artifact and comparing it with the model.",
                rich_help_panel=OUTPUT,
            ),
        ] = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
        json: Annotated[
            bool, typer.Option("--json", help="Print the manifest as JSON instead of a summary.", rich_help_panel=OUTPUT)
        ] = False,
        **settings: Any,
    ) -> None:
        from calibration.options import WeightOptions
        from elmexport.artifact import Artifact
        from elmexport.exporting import export as library_export

        weights = WeightOptions(
            method.value, _calibrate(calibrate), tokens, weights_from, save_weights, bits_per_weight, max_drop, time_budget
        )
        with progress_bar(quiet=quiet, verbose=verbose) as progress:
            result = library_export(
                model,
                target.name,
                quant,
                out=out,
                context=context,
                weights=weights,
                verify=not no_verify,
                force=force,
                settings=setting_values(settings),
                random_weights=random_weights,
                tokenizer=tokenizer,
                revision=revision,
                adapter=adapter,
                progress=progress,
            )
        for line in result.notes:
            note(line, quiet=quiet)
        artifact = Artifact.open(result.path)
        if json:
            print_json({"path": str(result.path), **artifact.manifest.to_dict()})
            return
        if quiet:
            typer.echo(result.path)
            return
        typer.echo(describe(artifact))
        path = shlex.quote(str(result.path))
        runs = result.has_tokenizer and (no_verify or artifact.manifest.self_check.done)  # not done: its engine is not installed
        example = f'generate {path} "Once upon a time"' if runs else f"inspect {path}"
        typer.echo(f"\nTry it:\n  elmexport {example}")

    # typer reads the signature: the target's own options stand where `settings` catches them.
    own = inspect.signature(export, eval_str=True)
    common = [parameter for parameter in own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    export.__signature__ = own.replace(parameters=[*common, *target_options(target)])  # type: ignore[attr-defined]
    return export
