"""Expansion of a plan into jobs: every combination checked before any work, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from calibration.methods import DEFAULT, METHODS
from calibration.options import Calibrate, WeightOptions
from calibration.preparation import check_method, check_schemes, with_own_codes
from calibration.weight_set import quantized_schemes
from elmexport.bench.workload import Workload
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.exporting import read_recipe
from elmexport.progress import Progress, SilentProgress
from elmexport.quantization.recipes import Recipe, resolve
from elmexport.sweep.cell import Combination, Planned, plan_cell, plan_reference
from elmexport.sweep.evaluations import evaluations
from elmexport.sweep.formats import SweepFormat, open_format
from elmexport.sweep.models import SweepModel, existing_file, open_model
from elmexport.sweep.plan import Plan, check_different


@dataclass(frozen=True)
class Expansion:
    """The jobs of a plan in their order, and what was left out of it, sentences."""

    jobs: tuple[Planned, ...]
    notes: tuple[str, ...]

    def assigned(self, sweep: str, threads: int | None) -> list[Planned]:
        """The jobs for the folder of the sweep with the identity `sweep`; `threads` of each, the workers' own share where None."""
        return [replace(each, job=msgspec.structs.replace(each.job, sweep=sweep, threads=threads)) for each in self.jobs]


def expand(plan: Plan, path: Path, out: Path, progress: Progress | None = None) -> Expansion:
    """Expand `plan`, which lies in the file `path`, into jobs that write into the folder `out`.

    Models are opened, and downloaded where they have to be: their contents are part of the keys.

    Raises:
        ElmExportError: anything that would make a cell fail for bad use, as far as it can be known before the work.
    """
    return _Expander(plan, path, out).expand(progress or SilentProgress())


class _Expander:
    """A plan with what it names, looked up."""

    def __init__(self, plan: Plan, path: Path, out: Path) -> None:
        self._plan, self._out, self._where, self._folder = plan, out, str(path), path.resolve().parent
        self._notes: dict[str, None] = {}
        self._excluding: set[int] = set()  # numbers of the exclusions that have left something out
        choices = plan.format_choices(self._where)
        check_different(tuple(choice.label for choice in choices), "formats", self._where)
        self._formats = [open_format(choice, self._folder, self._where) for choice in choices]
        self._weights = [self._weight_options(method) for method in plan.methods]
        if plan.tokens is not None and not any(each.reads_text for each in self._weights):
            raise ElmExportError(f"{self._where}: tokens says how much of a text to read, and none of the methods reads one; leave it out")
        self._evaluations = evaluations(plan, self._folder, self._where)
        if plan.bench is not None:
            given = {"prompts": plan.bench.prompt, "depths": plan.bench.depth, "generate": plan.bench.generate}
            Workload(**{name: value for name, value in given.items() if value is not None}).check()  # type: ignore[arg-type]
        if not self._evaluations and plan.bench is None:
            raise ElmExportError(
                f"{self._where} evaluates nothing: tasks and texts are empty, and there is no [bench]; leave one of them out"
            )
        self._recipes = {quant: self._recipes_of(quant) for quant in plan.quants}

    def expand(self, progress: Progress) -> Expansion:
        plan = self._plan
        models = [open_model(choice, self._folder, progress) for choice in plan.model_choices()]
        check_different(tuple(model.name for model in models), "models", self._where)
        for model in models if self._evaluations else ():
            if model.checkpoint.tokenizer_path is None:
                raise ElmExportError(
                    f"{self._where}: {model.written} has no tokenizer to read tasks and texts with; name one: {{ model = …, tokenizer = PATH }}"
                )
        jobs: list[Planned] = []
        for model in models:
            combinations = list(self._combinations(model))
            reference = None
            if combinations and self._evaluations:
                jobs.append(plan_reference(model, plan.context, self._evaluations, self._out))
                reference = jobs[-1].job.key
            jobs += [plan_cell(combination, self._out, reference) for combination in combinations]
        unused = next((number for number in range(len(plan.exclude)) if number not in self._excluding), None)
        if unused is not None:
            raise ElmExportError(f"{self._where}: exclude[{unused}] leaves nothing out; its names are those of the plan, compare them")
        self._check_different(jobs)
        if not jobs:
            raise ElmExportError(f"{self._where} leaves no cell: everything is excluded; take an [[exclude]] out")
        return Expansion(tuple(jobs), tuple(self._notes))

    def _check_different(self, jobs: Sequence[Planned]) -> None:
        """Refuse cells that are one and the same, and such as nobody could tell apart in a report."""
        by_key: dict[str, str] = {}
        labels: set[str] = set()
        for job in (each.job for each in jobs):
            if job.key in by_key and job.label != by_key[job.key]:
                raise ElmExportError(f"{self._where}: {by_key[job.key]} and {job.label} are the same; leave one of them out")
            if job.label in labels:
                raise ElmExportError(f"{self._where}: two cells are called {job.label}; give the recipes different names")
            by_key[job.key] = job.label
            labels.add(job.label)

    def _weight_options(self, method: str) -> WeightOptions:
        if method not in METHODS:
            raise ElmExportError(f"{self._where}: methods names {method!r}; known: {', '.join(METHODS)}")
        given = self._plan.calibrate
        calibrate: Calibrate = "auto"
        if given == "none":
            calibrate = "none"
        elif given is not None and given != "auto":
            calibrate = existing_file(given, "calibrate", self._folder, self._where)
        found = WeightOptions(method, calibrate)
        return replace(found, tokens=self._plan.tokens) if found.reads_text else found

    def _recipes_of(self, quant: str) -> dict[str, Recipe]:
        """The recipe `quant` by format, of those formats that have it."""
        if quant.endswith(".toml"):
            existing_file(quant, "quants", self._folder, self._where)
        found = {
            each.choice.label: read_recipe(each.target, self._option(quant))
            for each in self._formats
            if quant.endswith(".toml") or quant in each.target.quants
        }
        if not found:
            known = dict.fromkeys(name for each in self._formats for name in each.target.quants)
            raise ElmExportError(f"{self._where}: no format of the plan has the quantization {quant!r}; they have {', '.join(known)}")
        missing = [each.choice.label for each in self._formats if each.choice.label not in found]
        if missing:
            self._notes[f"{quant} is left out for {', '.join(missing)}, which does not have it"] = None
        return found

    def _option(self, quant: str) -> str:
        """The quantization as the command line takes it."""
        return str(existing_file(quant, "quants", self._folder, self._where)) if quant.endswith(".toml") else quant

    def _combinations(self, model: SweepModel) -> Iterator[Combination]:
        for each in self._formats:
            for quant in self._plan.quants:
                recipe = self._recipes[quant].get(each.choice.label)
                if recipe is not None:
                    yield from self._of_methods(model, each, quant, recipe)

    def _of_methods(self, model: SweepModel, each: SweepFormat, quant: str, recipe: Recipe) -> Iterator[Combination]:
        """The combinations of one quantization: one for each method, or only one where it leaves nothing for a method to find."""
        plan, taken = self._plan, False
        for option in self._weights:
            hits = [
                number
                for number, exclusion in enumerate(plan.exclude)
                if exclusion.matches(model.written, each.choice.format, quant, option.method)
            ]
            self._excluding.update(hits)
            if hits:
                continue
            schemes = self._schemes(model, each, quant, recipe, option)
            if taken and not schemes:
                self._notes[f"{option.method} is left out for {quant} of {each.choice.label}, which has no codes to find"] = None
                continue
            taken = True
            yield Combination(
                model,
                each.choice,
                each.target,
                self._option(quant),
                recipe,
                option,
                plan.context,
                self._evaluations,
                plan.bench,
                schemes,
            )

    def _schemes(self, model: SweepModel, each: SweepFormat, quant: str, recipe: Recipe, option: WeightOptions) -> Mapping[str, str]:
        """The schemes of quantized tensors.

        Raises:
            ElmExportError: the format cannot hold the model, or not so; with the lines that leave it out.
        """
        config, excluded = model.checkpoint.config, ""
        try:
            each.target.check(config, self._plan.context or config.dims.context)
            resolved = resolve(recipe if option.method == DEFAULT else with_own_codes(recipe), config)
            check_schemes(each.target, model.checkpoint, resolved)
            excluded = f', method = "{option.method}"'  # the others may be possible
            check_method(resolved, option.method)
        except MissingDependencyError:
            raise
        except ElmExportError as error:
            raise ElmExportError(
                f"{self._where}: {model.written} as {each.choice.label} {quant}: {error}. To leave it out: "
                f'[[exclude]] model = "{model.written}", format = "{each.choice.format}", quant = "{quant}"{excluded}'
            ) from None
        return quantized_schemes(resolved)
