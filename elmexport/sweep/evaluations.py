"""Evaluations of a sweep's cells: which tasks, with how many items, and which text each run of `elmexport eval` has.

One run takes one limit and one text. A plan with several of either has as many runs as the longer list, each task and text in one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

from elmexport.artifact import file_sha256
from elmexport.errors import ElmExportError
from elmexport.evaluation.data import LocalData
from elmexport.evaluation.evaluate import Settings
from elmexport.evaluation.tasks.presets import chosen_tasks
from elmexport.evaluation.tasks.suite import check_names
from elmexport.sweep.models import existing_file
from elmexport.sweep.plan import BUNDLED, Plan


@dataclass(frozen=True)
class Evaluation:
    """One run of `elmexport eval`; `options` are its command line's, `settings` the same for the reference."""

    settings: Settings
    options: tuple[str, ...]

    def determinants(self) -> dict[str, object]:
        """All that decides what is asked, files by their contents."""
        settings = self.settings
        return {
            "tasks": dict(settings.tasks),
            "limit": settings.limit,
            "seed": settings.seed,
            "data": None if settings.data is None or not settings.tasks else _folder_sha256(settings.data),
            "text": None if not settings.text_tokens else BUNDLED if settings.text is None else file_sha256(settings.text),
            "text_tokens": settings.text_tokens,
        }


def evaluations(plan: Plan, folder: Path, where: str) -> list[Evaluation]:
    """List the evaluations that every cell of `plan` has; none where it has neither a task nor a text. `where` is the plan's file.

    Raises:
        ElmExportError: unknown tasks, limits of tasks that are not run, or files that are not there.
    """
    names = None if plan.tasks is None else ",".join(plan.tasks) or "none"
    chosen = chosen_tasks(names, plan.preset, plan.fewshot)
    check_names(list(chosen))
    foreign = [task for task in plan.limits if task not in chosen]
    if foreign:
        raise ElmExportError(f"{where}: limits names {foreign[0]}, which is not among the tasks; they are {', '.join(chosen) or 'none'}")
    data = None if plan.data is None else existing_file(plan.data, "data", folder, where)
    if data is not None and chosen:
        LocalData(data)  # says what is wrong with it
    by_limit: dict[int | None, dict[str, int | None]] = {}
    for task, shots in chosen.items():
        by_limit.setdefault(plan.limits.get(task, plan.limit), {})[task] = shots
    texts = [None if text == BUNDLED else existing_file(text, "texts", folder, where) for text in plan.texts]
    runs = zip_longest(by_limit.items(), [(text,) for text in texts], fillvalue=None)
    return [_evaluation(plan, *(group or (None, {})), text, data) for group, text in runs]


def _evaluation(
    plan: Plan, limit: int | None, tasks: Mapping[str, int | None], text: tuple[Path | None] | None, data: Path | None
) -> Evaluation:
    tokens = 0 if text is None else plan.text_tokens
    settings = Settings(tasks, limit if tasks else None, plan.seed, data if tasks else None, None if text is None else text[0], tokens)
    options = ["--tasks", ",".join(tasks) or "none", "--text-tokens", str(tokens)]
    if tasks:
        found = (
            ("--preset", plan.preset),
            ("--fewshot", plan.fewshot),
            ("--limit", limit),
            ("--seed", plan.seed or None),
            ("--data", data),
        )
        options += [word for name, value in found if value is not None for word in (name, str(value))]
    options += [] if settings.text is None else ["--text", str(settings.text)]
    return Evaluation(settings, tuple(options))


def _folder_sha256(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return sha256("".join(f"{path.name} {file_sha256(path)}\n" for path in files).encode()).hexdigest()
