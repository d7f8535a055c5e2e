"""`elmexport bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elmexport.cli.command import GUESSING, OUTPUT
from elmexport.cli.describe import print_json, size, table
from elmexport.cli.progress import Quiet, Verbose, note, progress_bar
from elmexport.errors import ElmExportError

if TYPE_CHECKING:
    from elmexport.bench import ArtifactResult, Benchmark, Summary

WORKLOAD = "Workload"  # heading on the help page


def bench(
    artifacts: Annotated[
        list[Path], typer.Argument(help="Artifact folders, bare .onnx, .mlpackage or .gguf files, or checkpoint folders.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="N,…", help="Lengths of the prompts to read, tokens. [default: 128,512, as far as they fit]", rich_help_panel=WORKLOAD
        ),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens to decode one by one at each depth. [default: 64, as far as they fit]",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            metavar="N,…",
            help="Tokens that the cache holds before decoding. [default: 0,1024, as far as they fit]",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Rounds; each opens every artifact once, in a process of its own.", rich_help_panel=WORKLOAD),
    ] = 3,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads that every engine uses. [default: one for each core]", rich_help_panel=WORKLOAD),
    ] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Measure speculative decoding too, on a repetitive text: N tokens guessed from what the text said before.",
            rich_help_panel=GUESSING,
        ),
    ] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(
            metavar="ARTIFACT|MODEL",
            help="Measure speculative decoding too, tokens guessed by this artifact or model.",
            rich_help_panel=GUESSING,
        ),
    ] = None,
    num_draft_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens that --draft-model guesses at a time.", rich_help_panel=GUESSING)
    ] = 5,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Measure speed, load time and memory of artifacts, side by side.

    Prints medians over the rounds: tokens per second of prefill and decode with the spread of the rounds, the ratio to the first artifact,
    and for decode the part of this machine's read bandwidth that weights and cache take up. Core ML packages run in elmexport's executor
    except on a Mac: that says nothing about a device.

    \b
    Example:
      elmexport bench 450M-onnx 450M-gguf --depth 0,1024 --threads 4
    """
    from elmexport.bench import Guesses, Workload, benchmark
    from elmexport.bench.workload import DEPTHS, GENERATE, PARTS, PROMPTS

    workload = Workload(
        PROMPTS if prompt is None else _counts(prompt, "--prompt"),
        DEPTHS if depth is None else _counts(depth, "--depth"),
        GENERATE if generate is None else generate,
    )
    guesses = None
    if prompt_lookup is not None or draft_model is not None:
        guesses = Guesses(prompt_lookup, draft_model=draft_model, draft_tokens=num_draft_tokens)
    with progress_bar(quiet=quiet, verbose=verbose) as progress:
        fit = [part for part, given in zip(PARTS, (prompt, depth, generate), strict=True) if given is None]
        result = benchmark(artifacts, workload, repeat=repeat, threads=threads, fit=fit, guesses=guesses, progress=progress)
    if json:
        print_json(result.to_dict())
        return
    typer.echo(_describe(result))
    if guesses is not None:
        typer.echo(f"\n{table(_guessed(result.artifacts), right=frozenset({2, 3, 4, 5, 6}))}")
    for artifact in result.artifacts:
        if artifact.speculation is not None and artifact.speculation.note is not None:
            note(f"{artifact.name}: {artifact.speculation.note}", quiet=quiet)
        if artifact.note is not None:
            note(f"{artifact.name}: {artifact.note}", quiet=quiet)


def _guessed(artifacts: tuple[ArtifactResult, ...]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("guesses", "artifact", "accepted", "a step", "tokens/s", "plain", "speed-up")]
    for artifact in artifacts:
        if (one := artifact.speculation) is not None:
            accepted, rates = f"{one.accepted}/{one.drafted}", (f"{one.tokens_per_s.median:.1f}", f"{one.plain_tokens_per_s.median:.1f}")
            rows.append((one.how, artifact.name, accepted, f"{one.mean_accepted:.2f}", *rates, f"{one.speed_up:.2f}"))
            if (own := one.own) is not None:
                rates = f"{own.tokens_per_s.median:.1f}", f"{own.plain_tokens_per_s.median:.1f}"
                rows.append((own.how, artifact.name, "-", "-", *rates, f"{own.speed_up:.2f}"))
    return rows


def _counts(text: str, option: str) -> tuple[int, ...]:
    """Numbers of tokens, separated by commas; none where `text` is "none"."""
    if text == "none":
        return ()
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) < 10):
            raise ElmExportError(f"{option} is {text!r}; it takes whole numbers of tokens, separated by commas, or none")
    return tuple(map(int, words))


def _describe(result: Benchmark) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in result.machine.packages.items() if version is not None)
    lines = [
        f"{result.machine.system}, {result.machine.cpus} cores, {result.threads} threads, {result.repeat} rounds",
        packages,
        f"read bandwidth {size(round(result.bandwidth.median))}/s (spread {result.bandwidth.spread:.0%})",
        "",
        table(
            [
                ("artifact", "engine", "files", "load s", "peak memory"),
                *[
                    (one.name, one.engine, size(one.file_bytes), f"{one.load_s.median:.2f}", size(round(one.peak_bytes.median)))
                    for one in result.artifacts
                ],
            ],
            right=frozenset({2, 3, 4}),
        ),
        "",
        table([("what", "artifact", "tokens/s", "spread", "ratio", "bandwidth"), *_rates(result.artifacts)], right=frozenset({2, 3, 4, 5})),
    ]
    return "\n".join(lines)


def _rates(artifacts: tuple[ArtifactResult, ...]) -> list[tuple[str, ...]]:
    """A row for each rate, those of one kind together, artifacts in their order."""

    def row(what: str, name: str, rate: Summary, ratio: float | None, part: float | None) -> tuple[str, ...]:
        ratios = "-" if ratio is None else f"{ratio:.2f}"
        return what, name, f"{rate.median:.1f}", f"{rate.spread:.0%}", ratios, "" if part is None else f"{part:.0%}"

    prompts = sorted({one.tokens for artifact in artifacts for one in artifact.prefill})
    depths = sorted({one.depth for artifact in artifacts for one in artifact.decode})
    rows = []
    for prompt in prompts:
        for artifact in artifacts:
            rows += [
                row(f"prefill {prompt}", artifact.name, one.tokens_per_s, one.ratio, None)
                for one in artifact.prefill
                if one.tokens == prompt
            ]
    for depth in depths:
        for artifact in artifacts:
            rows += [
                row(f"decode {one.tokens} at {depth}", artifact.name, one.tokens_per_s, one.ratio, one.bandwidth_fraction)
                for one in artifact.decode
                if one.depth == depth
            ]
    return rows
