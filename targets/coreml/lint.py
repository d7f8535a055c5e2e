"""Linter of Core ML packages for the Neural Engine: `lint(path)`, with the rules of `targets.coreml.rules`.

Works on an artifact folder, on one package of it, and on any `.mlpackage` that holds an mlprogram, whoever made it. Nothing is run, so
nothing here says what a given device does: Core ML decides that itself, when it loads the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elmexport.artifact import MANIFEST, Artifact
from elmexport.errors import ElmExportError
from elmexport.mil.program import Program, TensorType, load_program
from targets.coreml.program_view import FunctionView, OperationView
from targets.coreml.rules import RULES, LintRule, Severity


@dataclass(frozen=True)
class LintFinding:
    """A breach of a rule. `operation` is an operation's type, or "input", "state", "output", "const", "weight file"."""

    rule: LintRule
    package: str
    function: str  # empty for a weight file
    operation: str
    name: str
    shape: tuple[int | None, ...]  # of its first output; empty for a weight file
    detail: str


@dataclass(frozen=True)
class LintResult:
    """Result of the linter: `findings` break a rule.

    `edges` would in the middle of a function, but lie before or behind all heavy work, where the CPU may do them.
    """

    packages: tuple[Path, ...]
    findings: tuple[LintFinding, ...]
    edges: tuple[LintFinding, ...]

    @property
    def failed(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.rule.severity is Severity.ERROR for finding in self.findings)


def lint(path: Path) -> LintResult:
    """Check every package of the artifact folder `path`, or the package `path`.

    Raises:
        ElmExportError: no Core ML package there, or one that cannot be read.
    """
    packages = _packages(path)
    findings: list[LintFinding] = []
    edges: list[LintFinding] = []
    for package in packages:
        for finding, edge in _check(load_program(package), package.name):
            (edges if edge else findings).append(finding)
    return LintResult(packages, tuple(findings), tuple(edges))


def _packages(path: Path) -> tuple[Path, ...]:
    if path.suffix == ".mlpackage":
        return (path,)
    if not path.is_dir():
        raise ElmExportError(f"{path} {'is a file' if path.exists() else 'does not exist'}; give an artifact folder or an .mlpackage")
    if (path / MANIFEST).is_file() and (target := Artifact.open(path).target) != "coreml":
        raise ElmExportError(
            f"{path} is an artifact for {target}; the rules of the Neural Engine are for Core ML: export it with elmexport coreml"
        )
    packages = tuple(sorted(path.glob("*.mlpackage")))
    if not packages:
        raise ElmExportError(f"{path} holds no .mlpackage; give an artifact folder that elmexport coreml made, or an .mlpackage")
    return packages


def _check(program: Program, package: str) -> Iterator[tuple[LintFinding, bool]]:
    """Each finding, and whether it lies at the edge of its function and is excused by that."""
    for file in program.files:
        for rule in RULES:
            for detail in () if rule.file is None else rule.file(file):
                yield LintFinding(rule, package, "", "weight file", file.name, (), detail), False
    seen: set[tuple[str, str, str]] = set()
    for function in (FunctionView(program, function) for function in program.functions.values()):
        for rule in RULES:
            for name, kind, detail in () if rule.function is None else rule.function(function):
                yield LintFinding(rule, package, function.name, _place(function, name), name, kind.shape, detail), False
        for view in (*function.constants, *function.operations):
            for finding in _constant_findings(view, function.name, package):
                # Functions share constants: each is named once.
                if (key := (finding.rule.id, finding.name, finding.detail)) not in seen:
                    seen.add(key)
                    yield finding, False
        for view in function.operations:
            for rule in RULES:
                for detail in () if rule.operation is None else rule.operation(view):
                    yield _finding(rule, view, function.name, package, detail), view.edge and not rule.edges


def _constant_findings(view: OperationView, function: str, package: str) -> Iterator[LintFinding]:
    for rule in RULES:
        for detail in () if rule.constant is None else rule.constant(view):
            yield _finding(rule, view, function, package, detail)


def _finding(rule: LintRule, view: OperationView, function: str, package: str, detail: str) -> LintFinding:
    kind: TensorType | None = view.outputs[0][1] if view.outputs else None
    return LintFinding(rule, package, function, view.type, view.name, () if kind is None else kind.shape, detail)


def _place(function: FunctionView, name: str) -> str:
    if name in function.function.states:
        return "state"
    return "input" if name in function.function.inputs else "output"
