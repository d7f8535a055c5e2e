"""lm-eval tasks by name: their definitions, and the rows that they get.

lm-eval's definitions (prompts, choices, metrics, aggregation) are used as they are. Only the source of the rows may differ: a local folder, or
for `cloze` the file beside its definition.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.evaluation.data import LocalData

CLOZE = "cloze"
# Folder of the definition in lm-eval's `tasks`. A name that is not here is looked for among all of lm-eval's, which takes some seconds.
FOLDERS: Mapping[str, str] = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "boolq": "super_glue/boolq",
    "crows_pairs_english": "crows_pairs",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "piqa": "piqa",
    "race": "race",
    "sciq": "sciq",
    "truthfulqa_mc2": "truthfulqa",
    "wikitext": "wikitext",
    "winogrande": "winogrande",
}
# The metric that is compared, also with the published figures (the families' published.toml say how it is known); other tasks: acc_norm, else
# acc, else their first.
METRICS: Mapping[str, str] = {
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "boolq": "acc",
    "crows_pairs_english": "pct_stereotype",
    "hellaswag": "acc_norm",
    "mmlu": "acc",
    "piqa": "acc_norm",
    "race": "acc",
    "sciq": "acc",
    "truthfulqa_mc2": "acc",
    "wikitext": "word_perplexity",
    "winogrande": "acc",
}
TEXT_ALONE = "--tasks none compares on the text alone"  # what evaluation can do without lm-eval
_WORDS = re.compile(rb"[^\s\"':,\[\]]+")


@dataclass(frozen=True)
class Suite:
    """lm-eval task of one name, or a group of several whose items are pooled."""

    name: str
    tasks: Sequence[Any]  # lm_eval.api.task.ConfigurableTask
    group: Mapping[str, Any] | None  # lm-eval's definition of the group
    fewshot: int
    notes: Sequence[str]  # what is not as lm-eval would have it, in words

    def metric(self) -> str:
        """The metric to compare by."""
        if self.name in METRICS:
            return METRICS[self.name]
        names = list(self.tasks[0].aggregation())
        return next((name for name in ("acc_norm", "acc") if name in names), names[0])


def require_lm_eval(otherwise: str) -> None:
    """Refuse, before any work, an environment without lm-eval. `otherwise` ends the message: what works without it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MissingDependencyError(
            f"tasks are run by lm-eval, which is not installed; install it with: pip install 'elmexport[eval]'. Without it, {otherwise}"
        )


def check_names(names: Sequence[str]) -> None:
    """Refuse names that stand nowhere in lm-eval's definitions: without importing it, which takes longer than reading all of them.

    Raises:
        ElmExportError: an unknown name, with the nearest known ones.
        MissingDependencyError: a name that only lm-eval may know, which is not installed.
    """
    unknown = {name for name in names if name not in FOLDERS and name != CLOZE}
    if not unknown:
        return
    require_lm_eval(TEXT_ALONE)
    package = find_spec("lm_eval")
    assert package is not None and package.origin is not None
    # Templates that definitions include have no suffix.
    definitions = (path for path in (Path(package.origin).parent / "tasks").rglob("*") if path.suffix in (".yaml", ".yml", ""))
    files = [path for path in definitions if path.is_file()]
    words = {word.decode(errors="replace") for path in files for word in _WORDS.findall(path.read_bytes())}
    for name in sorted(unknown - words):
        near = [word for word in words if word[:3] == name[:3] and "_" in word]  # of so many words, comparing all takes long
        raise _unknown(name, near)


def _unknown(name: str, names: Sequence[str]) -> ElmExportError:
    known = [CLOZE, *FOLDERS]
    near = get_close_matches(name, known, n=3) or get_close_matches(name, names, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return ElmExportError(f"no task is called {name!r}{hint} Known: {', '.join(known)}, and lm-eval's others")


def load_suites(fewshot: Mapping[str, int | None], data: LocalData | None) -> list[Suite]:
    """The tasks that `fewshot` names, with so many examples each (the task's own number where None), rows loaded.

    Raises:
        ElmExportError: an unknown name, with the nearest known ones; rows that are not there, damaged or empty.
    """
    index = _index(list(fewshot))
    return [_load(name, shots, index, data) for name, shots in fewshot.items()]


def _index(names: Sequence[str]) -> Mapping[str, Any]:
    """lm-eval's index of task definitions, of the folders that `names` need."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    unknown = [name for name in names if name not in FOLDERS and name != CLOZE]
    with as_file(files(__package__)) as own:
        folders = [own, *sorted({root / FOLDERS[name] for name in names if name in FOLDERS})]
        # later folders win: our own `cloze` stays ours
        manager = _manager(bool(unknown), (own,) if unknown else tuple(folders))
    for name in unknown:
        if name not in manager.task_index:
            raise _unknown(name, manager.all_tasks)
    return manager.task_index


@cache  # to read all definitions takes seconds, and a report on several artifacts asks for them each time
def _manager(defaults: bool, folders: tuple[Path, ...]) -> Any:
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager(include_defaults=defaults, include_path=list(folders))


def _load(name: str, fewshot: int | None, index: Mapping[str, Any], data: LocalData | None) -> Suite:
    from elmexport.evaluation.tasks.local import build_task

    entry = index[name]
    leaves = list(_leaves(name, index))
    grouped = leaves != [name]
    configs = [_config(leaf, index) for leaf in leaves]
    shots, notes = _shots(fewshot, configs[0])
    tasks, empty = [], []
    for leaf, config in zip(leaves, configs, strict=True):
        task, remark = build_task(config, name, data, shots, may_be_empty=grouped)
        notes += [note for note in remark if note not in notes]
        if task is None:
            empty.append(leaf)
        else:
            tasks.append(task)
    if not tasks:
        raise ElmExportError(f"{name}: there are no rows for any of its {len(leaves)} parts")
    if empty:
        notes.append(f"{len(empty)} of {len(leaves)} parts have no rows and are left out: {', '.join(empty)}")
    group = None
    if grouped:
        group = {**{key: value for key, value in (entry.cfg or {}).items() if key not in ("tag", "include")}, "group": name}
    return Suite(name, tasks, group, shots, notes)


def _shots(asked: int | None, config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """How many few-shot examples, and a note where the task does not take what is asked for."""
    own = config.get("num_fewshot")
    if config.get("output_type") == "loglikelihood_rolling":
        own = 0
    if asked is None or asked == own:
        return own or 0, []
    if own == 0:  # as in lm-eval: such a task's prompt has no place for examples
        return 0, [f"takes no few-shot examples, so the {asked} asked for are left out"]
    return asked, []


def _leaves(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The tasks that `name`, a task, a tag or a group, is made of."""
    entry = index[name]
    members = entry.cfg.get("task") if entry.kind.name == "GROUP" else sorted(entry.tags) if entry.kind.name == "TAG" else None
    if members is None:
        if entry.kind.name != "TASK":
            raise ElmExportError(f"{name} is a task that runs Python code of its own, which is not supported; choose another")
        yield name
        return
    for member in members if isinstance(members, list) else [members]:
        if not isinstance(member, str) or member not in index:
            raise ElmExportError(f"the group {name} changes its tasks' settings, which is not supported; name its tasks one by one")
        yield from _leaves(member, index)


def _config(name: str, index: Mapping[str, Any]) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(index[name].yaml_path, resolve_func=True)
    return {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
