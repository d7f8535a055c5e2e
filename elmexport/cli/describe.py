"""Description of an artifact in words, from its manifest, and JSON output of every command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from elmexport.artifact import Artifact


def print_json(document: Any) -> None:
    """Print `document` on stdout."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def size(count: int) -> str:
    """Format `count` bytes in the largest decimal unit of which there is at least one."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def table(rows: list[tuple[str, ...]], *, right: frozenset[int] = frozenset()) -> str:
    """Format `rows` in columns two spaces apart, those in `right` aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def describe(artifact: Artifact) -> str:
    """Describe an artifact: its model, its size, how close it is to the model it came from, one fact a line."""
    return table(list(_facts(artifact)))


def _facts(artifact: Artifact) -> Iterator[tuple[str, str]]:
    manifest = artifact.manifest
    model, quant, check = manifest.model, manifest.quant, manifest.self_check
    revision = f", revision {model.revision}" if model.revision else ""
    yield "model", f"{model.name}, {model.parameters:,} parameters ({model.source}{revision})"
    yield "format", manifest.target
    yield "quantization", f"{quant.name}: {quant.words}"
    yield "size", f"{size(sum(file.bytes for file in manifest.files.values()))}, {manifest.bits_per_weight:.2f} bits per weight"
    for number, package in enumerate(() if manifest.chain is None else manifest.chain.packages, start=1):
        first, last = package.layers
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield f"package {number}", f"{package.file}: {layers}, {size(package.weight_bytes)} of weights"
    yield "context", f"{manifest.context:,} tokens"
    if manifest.alpha != 1:
        measured = manifest.calibration is not None and manifest.calibration.method == "measured"
        found = "measured" if measured else "a safe default, not measured"
        yield "residual scale", f"{manifest.alpha:g}, so that fp16 cannot overflow ({found})"
    for fallback in manifest.fallbacks:
        yield "fallback", f"{fallback.tensor}: {fallback.reason}"
    if check.kl_mean is None or check.top1_agreement is None:
        yield "self-check", f"not done: {check.reason}"
    else:
        kl = f"KL divergence {check.kl_mean:.3g} nats per token, top-1 agreement {check.top1_agreement:.1%}"
        yield "self-check", f"{kl}, over {check.tokens} tokens of {check.text}"
        if check.step_up is not None:
            step = check.step_up
            plain = quant.method in ("mse", "rtn")
            found = "" if plain else ", by mse"  # what a step up loses is measured without a calibration
            same_size = "; at this size, try --method gptq" if plain and manifest.bits_per_weight < 8 else ""
            yield (
                "loss",
                f"KL {check.kl_mean:.3g}; one step up, --quant {step.quant} ({step.bits_per_weight:.2f} bits per weight){found}: {step.kl_mean:.3g}{same_size}",
            )
    yield "path", str(artifact.path)
