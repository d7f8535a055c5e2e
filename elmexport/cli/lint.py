"""`elmexport lint`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elmexport.cli.describe import print_json, table
from elmexport.cli.progress import progress_bar

if TYPE_CHECKING:
    from targets.coreml.lint import LintFinding


def lint(
    artifact: Annotated[Path, typer.Argument(help="The folder that an export printed, or any .mlpackage that holds an mlprogram.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document, every finding by itself, instead of text.")] = False,
) -> None:
    """Find what keeps a Core ML package off the Neural Engine.

    Reads the package; runs nothing. Exit code 1 if a finding is an error (the operation or package stays off the Neural Engine); warnings
    (it runs, but slower, or not on every device) do not change the exit code. What only the CPU can do, but lies before or behind all heavy
    work, is told and is no finding.

    \b
    Example:
      elmexport lint tiny-coreml
    """
    from targets.coreml.lint import lint as check

    with progress_bar(transient=True) as progress:
        progress.stage(f"reading {artifact.name}")
        result = check(artifact)
    if json:
        findings, edges = ([_document(finding) for finding in found] for found in (result.findings, result.edges))
        print_json({"path": str(artifact), "packages": [p.name for p in result.packages], "findings": findings, "edges": edges})
    else:
        for line in _grouped(result.findings):
            typer.echo(line)
        counts = Counter(finding.rule.severity for finding in result.findings)
        told = ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in sorted(counts.items()))
        typer.echo(f"{', '.join(package.name for package in result.packages)}: {told or 'no finding'}")
        if result.edges:
            kinds = ", ".join(f"{operation} ({count})" for operation, count in sorted(Counter(f.operation for f in result.edges).items()))
            typer.echo(f"For the CPU, before or behind all heavy work (no finding): {kinds}")
    if result.failed:
        raise typer.Exit(1)


def _document(finding: LintFinding) -> dict[str, object]:
    rule = finding.rule
    return {
        "rule": rule.id,
        "title": rule.title,
        "severity": rule.severity.value,
        "sources": list(rule.sources),
        "package": finding.package,
        "function": finding.function,
        "operation": finding.operation,
        "name": finding.name,
        "shape": list(finding.shape),
        "detail": finding.detail,
    }


def _grouped(findings: tuple[LintFinding, ...]) -> list[str]:
    """One paragraph a rule: what it says and who says it, then the operations, equal ones in one line with their number."""
    lines = []
    for rule in dict.fromkeys(finding.rule for finding in findings):
        lines.append(f"{rule.id} {rule.severity}: {rule.title}")
        lines += [f"  {source}" for source in rule.sources]
        groups: dict[tuple[object, ...], list[LintFinding]] = {}
        for finding in findings:
            if finding.rule is rule:
                groups.setdefault((finding.package, finding.function, finding.operation, finding.shape, _kind(finding)), []).append(finding)
        lines.append(table([_row(group) for group in groups.values()]))
        lines.append("")
    return lines


def _kind(finding: LintFinding) -> str:
    """What is wrong, without names that differ from one operation to the next."""
    return " ".join(word for word in finding.detail.split() if word != finding.name and "_" not in word)


def _row(group: list[LintFinding]) -> tuple[str, ...]:
    first = group[0]
    shape = "x".join("?" if size is None else str(size) for size in first.shape)
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return f"    {first.function or first.package}", first.operation, shape, f"{first.name}{more}", first.detail
