"""`elmexport onnx`, `elmexport coreml`, `elmexport gguf`: one declaration, one command for each target."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from calibration.methods import DEFAULT, METHODS, methods_help
from elmexport.cli.describe import describe, print_json
from elmexport.cli.progress import progress_bar
from elmexport.cli.target_options import target_options

# What each command's --help says. The lists of --quant are the targets' own; a test holds them together.
TARGETS: Mapping[str, str] = {
    "onnx": """Export a model to ONNX, for onnxruntime.

    \b
    --quant is one of
      int4           4-bit weights in blocks of 32; embedding and head 8-bit (default)
      int4-block64   the same in blocks of 64: smaller, faster, less exact
      int4-block128  the same in blocks of 128
      int4-asym      4-bit weights with zero points; embedding and head 8-bit
      int4-all       4-bit weights in blocks of 32, embedding and head as well
      int8           8-bit weights in blocks of 32
      fp16           half precision
      fp32           full precision

    \b
    Example:
      elmexport onnx --model 450M --quant int8 --out openelm-onnx
    """,
    "coreml": """Export a model to Core ML. Works on Linux too.

    \b
    --quant is one of
      int4   4-bit weights in blocks of 32; embedding and head 8-bit (default)
      int8   8-bit weights, one scale for each output channel
      lut4   4-bit look-up tables, one for every 8 output channels; embedding and head 8-bit
      lut6   6-bit look-up tables, one for every 16 output channels; embedding and head 8-bit
      lut8   8-bit look-up tables, one for each matrix; embedding and head 8-bit
      fp16   half precision

    \b
    Example:
      elmexport coreml --model tiny --quant int4
    """,
    "gguf": """Export a model to GGUF, for llama.cpp.

    \b
    --quant is one of
      int4    Q4_0, scales of least error; embedding Q8_0 (default)
      int8    Q8_0
      fp16    F16
      bf16    BF16
      fp32    F32
    llama.cpp's own, byte for byte; bits per weight of 450M (pip install xllamacpp)
      q8_0    8.5
      q6_k    6.6
      q5_1    6.1
      q5_k_m  5.8
      q5_0    5.6
      q5_k_s  5.6
      q4_1    5.2
      q4_k_m  5.1
      iq4_nl  4.9
      q4_k_s  4.8
      q4_0    4.7
      iq4_xs  4.7
      q3_k_l  4.7
      q3_k_m  4.2
      q3_k_s  3.8
      q2_k    3.5

    \b
    Example:
      elmexport gguf --model 1.1B-Instruct --quant q4_k_m --context 1024
    """,
}


MethodName = StrEnum("MethodName", {name: name for name in METHODS})  # type: ignore[misc]  # the values of --method


def _calibrate(value: str) -> Literal["auto", "none"] | Path:
    if value == "auto":
        return "auto"
    return "none" if value == "none" else Path(value)


def command(target: str) -> Callable[..., None]:
    """The command that exports to `target`."""

    def export(
        model: Annotated[
            str,
            typer.Option(
                metavar="NAME|ID|PATH", help="A name from `elmexport models`, a hub id, a checkpoint folder, or a CoreNet .pt file."
            ),
        ] = "tiny",
        quant: Annotated[
            str | None,
            typer.Option(metavar="QUANT|FILE", help="How weights are stored: see the list above, or a recipe of your own (.toml)."),
        ] = None,
        out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write. [default: ./MODEL-TARGET-QUANT]")] = None,
        context: Annotated[
            int | None,
            typer.Option(
                min=1,
                metavar="TOKENS",
                help="Tokens that the artifact can attend to, prompt and answer together. [default: the model's maximum]",
            ),
        ] = None,
        method: Annotated[
            MethodName,
            typer.Option(help=f"How codes are found. {methods_help()}."),
        ] = MethodName[DEFAULT],
        calibrate: Annotated[
            str,
            typer.Option(
                metavar="auto|none|FILE",
                help="auto: measure the model's activations on a short text, to weight errors and to scale them to fit half precision, and quantize along a longer one where the method needs it; none: no weights, and a scale that is safe for most models; FILE: a text, statistics from `elmexport calibrate`, or llama.cpp's importance matrix (.gguf).",
            ),
        ] = "auto",
        tokens: Annotated[
            int | None, typer.Option(min=1, metavar="TOKENS", help="How much of the calibration text to read. [default: 32768]")
        ] = None,
        bits_per_weight: Annotated[
            float | None,
            typer.Option(
                min=1,
                metavar="BITS",
                help="Let each matrix have the scheme that its sensitivity asks for, so many bits a parameter on average; writes recipe.toml into the artifact.",
            ),
        ] = None,
        max_drop: Annotated[
            float | None,
            typer.Option(
                min=0,
                metavar="PP",
                help="Find the smallest such mix that loses at most so many percentage points of accuracy on the bundled cloze task; several tries, each measured.",
            ),
        ] = None,
        weights_from: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Take the codes from a file that --save-weights wrote, instead of computing them."),
        ] = None,
        save_weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the codes that --method gptq found.")] = None,
        random_weights: Annotated[
            int | None,
            typer.Option(
                min=0, metavar="SEED", help="Export the model's shapes with random weights, to try speed and size without a download."
            ),
        ] = None,
        tokenizer: Annotated[
            str | None,
            typer.Option(
                metavar="PATH|ID",
                help="tokenizer.model or tokenizer.json, a folder or hub id that has one, or none. [default: found with the model]",
            ),
        ] = None,
        revision: Annotated[
            str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a model on the hub. [default: main]")
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")] = False,
        no_verify: Annotated[
            bool,
            typer.Option(
                "--no-verify", help="Skip the check that ends every export: running the artifact and comparing it with the model."
            ),
        ] = False,
        json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON instead of a summary.")] = False,
        **settings: Any,
    ) -> None:
        from calibration.options import WeightOptions
        from elmexport.artifact import Artifact
        from elmexport.export import export as library_export

        weights = WeightOptions(method.value, _calibrate(calibrate), tokens, weights_from, save_weights, bits_per_weight, max_drop)
        with progress_bar() as progress:
            result = library_export(
                model,
                target,
                quant,
                out=out,
                context=context,
                weights=weights,
                verify=not no_verify,
                force=force,
                settings=settings,
                random_weights=random_weights,
                tokenizer=tokenizer,
                revision=revision,
                progress=progress,
            )
        for note in result.notes:
            typer.echo(f"note: {note}", err=True)
        artifact = Artifact.open(result.path)
        if json:
            print_json({"path": str(result.path), **artifact.manifest})
            return
        typer.echo(describe(artifact))
        path = shlex.quote(str(result.path))
        example = f'generate {path} "Once upon a time"' if result.has_tokenizer else f"inspect {path}"
        typer.echo(f"\nTry it:\n  elmexport {example}")

    # typer reads the signature: the target's own options stand where `settings` catches them.
    own = inspect.signature(export, eval_str=True)
    common = [parameter for parameter in own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    export.__signature__ = own.replace(parameters=[*common, *target_options(target)])  # type: ignore[attr-defined]
    return export
