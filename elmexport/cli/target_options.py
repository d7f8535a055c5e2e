"""Options that only one target's command has: one row for each field of the target's class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Operators(StrEnum):
    """The values of `onnx --ops`."""

    FAST = "fast"
    STANDARD = "standard"


class Device(StrEnum):
    """The values of `coreml --device`."""

    NEURAL_ENGINE = "neural-engine"
    GPU = "gpu"


class Cache(StrEnum):
    """The values of `coreml --kv`."""

    STATE = "state"
    IO = "io"


# By target: the field's name, its annotation as typer reads it, its default. A test holds the rows and the targets' fields together.
OPTIONS: Mapping[str, tuple[tuple[str, Any, Any], ...]] = {
    "onnx": (
        (
            "ops",
            Annotated[
                Operators,
                typer.Option(help="fast: onnxruntime's own operators; standard: operators of ONNX opset 24 alone, for other engines."),
            ],
            Operators.FAST,
        ),
    ),
    "coreml": (
        (
            "device",
            Annotated[Device, typer.Option(help="The form of the program: what the Neural Engine or what the GPU runs best.")],
            Device.NEURAL_ENGINE,
        ),
        (
            "kv",
            Annotated[
                Cache,
                typer.Option(
                    help="Where the cache lives. state: in Core ML; io: in an input, and the caller writes new keys and values to it."
                ),
            ],
            Cache.STATE,
        ),
        (
            "prefill",
            Annotated[
                int | None,
                typer.Option(metavar="TOKENS", help="Tokens that the prefill function reads at once. [default: 64, at most the context]"),
            ],
            None,
        ),
        (
            "argmax",
            Annotated[
                bool, typer.Option("--argmax", help="Give the most likely token instead of logits; such a package cannot be evaluated.")
            ],
            False,
        ),
        (
            "max_package_mb",
            Annotated[
                float | None,
                typer.Option(
                    metavar="MB",
                    help="Cut the model into packages of at most so many megabytes of weights. [default: 1000; with --device gpu, which never cuts, 2000]",
                ),
            ],
            None,
        ),
    ),
    "gguf": (
        (
            "imatrix",
            Annotated[
                Path | None,
                typer.Option(
                    metavar="FILE", help="Importance matrix in llama.cpp's GGUF form, for the quantizations that llama.cpp names."
                ),
            ],
            None,
        ),
        (
            "chat_template",
            Annotated[
                Path | None,
                typer.Option(
                    metavar="FILE", help="Chat template to put into the file: Jinja text, or a tokenizer_config.json that has one."
                ),
            ],
            None,
        ),
        (
            "split_max_size",
            Annotated[
                str | None,
                typer.Option(
                    metavar="SIZE", help="Split into files of at most so many bytes of weights each: 500M, 2G. [default: one file]"
                ),
            ],
            None,
        ),
    ),
}


def target_options(target: str) -> list[inspect.Parameter]:
    """The parameters that the command of `target` has beyond those of every target."""
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation, default in OPTIONS[target]
    ]
