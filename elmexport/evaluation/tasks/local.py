"""One lm-eval task over the rows it is given: a local folder's, the bundled ones, or the hub's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from tqdm import tqdm  # type: ignore[import-untyped]

from elmexport.errors import ElmExportError
from elmexport.evaluation.data import EVALUATION_FALLBACK, FEWSHOT_FALLBACK, UNNAMED, LocalData, read_lines
from elmexport.evaluation.layouts import LAYOUTS, DataRow, Layout
from elmexport.evaluation.tasks.hub import hub

BUNDLED = "elmexport/"  # dataset_path of tasks whose rows lie beside their definition


class RowTask(ConfigurableTask):  # type: ignore[misc]
    """lm-eval's task with the rows in `splits` in place of a download; `places` says where each evaluated row stands, where known."""

    def __init__(self, config: dict[str, Any], splits: Mapping[str, Sequence[DataRow]] | None) -> None:
        self._splits = splits
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._splits is None:
            with hub(self.DATASET_PATH):
                super().download(dataset_kwargs, **kwargs)
        else:
            self.dataset = datasets.DatasetDict({name: _dataset(lines) for name, lines in self._splits.items()})

    def place(self, doc_id: int) -> str:
        """Place of a document's row in its file, for errors."""
        lines = (self._splits or {}).get(self.config.test_split or self.config.validation_split, ())
        if len(lines) == len(self.task_docs):  # else the task itself left some out
            return lines[doc_id].place
        return f"row {doc_id} of {self.DATASET_PATH}"


def build_task(
    config: dict[str, Any], name: str, data: LocalData | None, fewshot: int, *, may_be_empty: bool
) -> tuple[RowTask | None, list[str]]:
    """The task of a definition, and what is not as lm-eval would have it; None where `may_be_empty` and there are no rows.

    Raises:
        ElmExportError: rows that are missing, damaged or empty, or do not fit the task.
        MissingDependencyError: the hub cannot be reached.
    """
    notes: list[str] = []
    if config["dataset_path"].startswith(BUNDLED):
        splits: dict[str, Sequence[DataRow]] | None = {"test": _bundled(config["dataset_path"])}
    elif data is None:
        splits = None
    else:
        splits = _choose_splits(config, name, data, fewshot, notes)
        if not splits[evaluated_split(config)]:
            if may_be_empty:
                return None, notes
            raise ElmExportError(f"{name}: {data.folder} has a file for it, but no rows in it; add some, or leave the task out")
    with quiet():
        try:
            return RowTask({**config, "num_fewshot": fewshot}, splits), notes
        except ElmExportError:
            raise
        except Exception as error:  # a row that a prompt template cannot take
            raise ElmExportError(
                f"the rows for {config['task']} do not fit the task ({_first_line(error)}); compare them with its columns"
            ) from error


def _choose_splits(config: dict[str, Any], name: str, data: LocalData, fewshot: int, notes: list[str]) -> dict[str, Sequence[DataRow]]:
    """Pick files for the evaluated rows and the few-shot examples, and set the definition's splits where lm-eval's own are not there."""
    layout = LAYOUTS.get(name) or Layout((config["task"],), {})
    found = data.splits(layout)
    if not found:
        names = ", ".join(f"{file}.SPLIT.jsonl" for file in layout.files)
        raise ElmExportError(f"{name}: {data.folder} holds no {names}; it has {', '.join(data.names())}. Add it, or leave the task out")
    wanted = evaluated_split(config)
    own = next(split for split in (wanted, UNNAMED, *EVALUATION_FALLBACK) if split in found)
    if own not in (wanted, UNNAMED):
        notes.append(f"evaluated on {found[own].name}: lm-eval's own split, {wanted}, is not in {data.folder}")
    splits: dict[str, Sequence[DataRow]] = {wanted: _rows(config, name, data, found[own], layout)}
    shots = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split") or wanted
    if fewshot and shots != wanted:
        source = next(split for split in (shots, *FEWSHOT_FALLBACK, own) if split in found)
        if source != shots:
            notes.append(
                f"few-shot examples come from {found[source].name}: lm-eval's own split for them, {shots}, is not in {data.folder}"
            )
        if source == own:
            config["test_split"] = config["fewshot_split"] = wanted  # the same split: then lm-eval keeps a document out of its own examples
        else:
            splits[shots] = _rows(config, name, data, found[source], layout)
    for key in ("training_split", "validation_split", "fewshot_split"):
        if config.get(key) not in splits:
            config[key] = None
    return splits


def evaluated_split(config: Mapping[str, Any]) -> str:
    """The split that lm-eval evaluates."""
    return str(config.get("test_split") or config.get("validation_split") or "test")


def _rows(config: Mapping[str, Any], name: str, data: LocalData, path: Path, layout: Layout) -> list[DataRow]:
    lines = data.lines(path, layout)
    if name != config["task"] and "subject" in layout.columns:  # one file for all of a group's data sets
        return [line for line in lines if line.row["subject"] == config["dataset_name"]]
    return lines


def _bundled(dataset_path: str) -> list[DataRow]:
    return read_lines(Path(str(files(__package__) / f"{dataset_path.removeprefix(BUNDLED)}.jsonl")))


def _dataset(lines: Sequence[DataRow]) -> datasets.Dataset:
    """
    Raises:
        ElmExportError: a column whose values differ in kind from row to row.
    """
    rows = [line.row for line in lines]
    try:
        return datasets.Dataset.from_list(rows)
    except Exception as error:
        for line in lines:  # which one it was: the first that does not go with the first row
            try:
                datasets.Dataset.from_list([rows[0], line.row])
            except Exception:
                raise ElmExportError(
                    f"{line.place}: its columns are of other kinds than those of {lines[0].place} ({_first_line(error)})"
                ) from error
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval and datasets, which speak about every step, on the root of their loggers and with progress bars."""
    logger = logging.getLogger("lm_eval")
    level, shown, interval = logger.level, datasets.is_progress_bar_enabled(), tqdm.monitor_interval
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # Even a bar that is not shown starts a thread that watches it, and Python waits for ever for one that finds no memory.
    tqdm.monitor_interval = 0
    try:
        yield
    finally:
        tqdm.monitor_interval = interval
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
