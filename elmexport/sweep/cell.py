"""Jobs of a sweep: what determines a cell or a reference, its key, its commands, and what it computes that others need too."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from calibration.methods import DEFAULT
from calibration.options import WeightOptions
from elmexport import __version__
from elmexport.artifact import file_sha256
from elmexport.quantization.recipes import Recipe
from elmexport.runtimes import engine_version
from elmexport.sweep.evaluations import Evaluation
from elmexport.sweep.jobs import CellFacts, Job, Kind, Step
from elmexport.sweep.models import SweepModel
from elmexport.sweep.plan import Benchmark, FormatChoice
from elmexport.sweep.reference import ReferenceRun
from elmexport.target import Target

KEY_LENGTH = 20  # hexadecimal digits of a key
_ELMEXPORT = ("-m", "elmexport")


@dataclass(frozen=True)
class Planned:
    """A job with what it waits for.

    Args:
        after: key of the reference that must be there first; None: nothing.
        groups: jobs of one group compute the same weight set or statistics: one of them goes first, and the others find it.
    """

    job: Job
    after: str | None = None
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Combination:
    """One model, format, quantization and method of a plan, with all that its commands need.

    Args:
        quant: as the command line takes it, a recipe's path absolute.
        context: as the plan has it; None: the model's maximum.
        schemes: of the quantized tensors, by name.
    """

    model: SweepModel
    choice: FormatChoice
    target: Target
    quant: str
    recipe: Recipe
    weights: WeightOptions
    context: int | None
    evaluations: Sequence[Evaluation]
    bench: Benchmark | None
    schemes: Mapping[str, str]

    @property
    def label(self) -> str:
        return " ".join([self.model.name, self.choice.label, self.recipe.name, self.weights.method])

    @property
    def artifact(self) -> str:
        """Name of the artifact's folder, as an export would choose it, and what tells it from others of the sweep."""
        method = [] if self.weights.method == DEFAULT else [self.weights.method]
        return "-".join([self.model.name, self.choice.format, *_words(self.choice), self.recipe.name, *method])


def plan_cell(combination: Combination, folder: Path, reference: str | None) -> Planned:
    """Make the job of a combination, in the sweep's `folder`, after the reference with the key `reference`."""
    one = combination
    files = tuple(f"eval-{number}.json" for number in range(1, len(one.evaluations) + 1))
    packages = _packages(one.target)
    determinants = _plain(
        {
            "model": one.model.determinants,
            "format": one.choice.format,
            "settings": one.target.settings(),
            "recipe": one.recipe.to_dict(),
            "method": one.weights.method,
            "calibrate": _source(one.weights),
            "tokens": one.weights.tokens,
            "context": one.context,
            "evaluations": [evaluation.determinants() for evaluation in one.evaluations],
            "bench": one.bench,
            "engine": engine_version(one.choice.format),
            "packages": packages,
        }
    )
    facts = CellFacts(
        model=one.model.name,
        format=one.choice.label,
        quant=one.recipe.name,
        method=one.weights.method,
        artifact=one.artifact,
        evaluations=files,
        benchmark=None if one.bench is None else "bench.json",
        determinants=determinants,
    )
    steps = [Step("export", (*_ELMEXPORT, *_export_arguments(one)))]
    for number, (evaluation, file) in enumerate(zip(one.evaluations, files, strict=True), start=1):
        arguments = ("eval", one.artifact, *evaluation.options, *one.model.eval_options, "--report", file)
        steps.append(Step("eval" if number == 1 else f"eval {number}", (*_ELMEXPORT, *arguments)))
    if one.bench is not None:
        steps.append(Step("bench", (*_ELMEXPORT, "bench", one.artifact, *_bench_arguments(one.bench), "--json"), facts.benchmark))
    job = Job(_key(determinants), one.label, Kind.CELL, str(folder), tuple(steps), packages, facts)
    return Planned(job, reference, tuple(_groups(one)))


def plan_reference(model: SweepModel, context: int | None, evaluations: Sequence[Evaluation], folder: Path) -> Planned:
    """Make the job that evaluates the fp16 reference of `model` for artifacts with a context of `context` tokens."""
    context = context or model.checkpoint.config.dims.context
    packages = _packages(None)
    determinants = {
        "model": model.determinants,
        "context": context,
        "evaluations": [evaluation.determinants() for evaluation in evaluations],
        "packages": packages,
    }
    run = ReferenceRun(model.choice, context, tuple(evaluation.settings for evaluation in evaluations))
    step = Step("reference", ("-m", "elmexport.sweep.reference", run.to_json()))
    return Planned(Job(_key(determinants), f"{model.name} fp16 reference", Kind.REFERENCE, str(folder), (step,), packages))


def _export_arguments(one: Combination) -> Iterator[str]:
    yield from (one.choice.format, *one.model.export_options, "--quant", one.quant, "--out", one.artifact)
    if one.weights.method != DEFAULT:
        yield from ("--method", one.weights.method)
    if one.weights.calibrate != "auto":
        yield from ("--calibrate", str(one.weights.calibrate))
    for name, value in (("--tokens", one.weights.tokens), ("--context", one.context)):
        if value is not None:
            yield from (name, str(value))
    for name, setting in one.choice.settings.items():
        flag = f"--{name.replace('_', '-')}"
        if setting is True:
            yield flag
        elif setting is not False:
            yield from (flag, str(setting))


def _bench_arguments(bench: Benchmark) -> Iterator[str]:
    for name, counts in (("--prompt", bench.prompt), ("--depth", bench.depth)):
        if counts is not None:
            yield from (name, ",".join(map(str, counts)))
    if bench.generate is not None:
        yield from ("--generate", str(bench.generate))
    yield from ("--repeat", str(bench.repeat))


def _words(choice: FormatChoice) -> list[str]:
    """The settings of a format as parts of a file name."""
    return [f"{name}-{Path(str(value)).name}".replace("_", "-") for name, value in sorted(choice.settings.items())]


def _groups(one: Combination) -> Iterator[str]:
    """Names of what a cell computes that others of its model compute too, and the cache keeps."""
    weights, method = one.weights, one.weights.find_method()
    read = {"model": one.model.determinants, "text": _source(weights), "tokens": weights.tokens}
    if method.makes_weight_set:
        yield _key({**read, "method": weights.method, "schemes": dict(one.schemes)})
    if weights.reads_text and method.measures_statistics:
        yield _key({**read, "what": "statistics"})


def _source(weights: WeightOptions) -> str:
    return weights.calibrate if isinstance(weights.calibrate, str) else file_sha256(weights.calibrate)


def _packages(target: Target | None) -> dict[str, str]:
    """Versions of what computes a job, of elmexport and Python; workers must have the same."""
    found = {"elmexport": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "lm_eval", *(() if target is None else target.tools())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # a tool that is no package
    return found


def _plain(determinants: Mapping[str, Any]) -> dict[str, Any]:
    """The determinants as values that JSON has."""
    return msgspec.to_builtins(determinants, str_keys=True)


def _key(determinants: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
