"""Layouts of the tasks' rows in local JSONL files: file names, columns, and the conversion to what lm-eval's task reads.

The columns are those of the Hugging Face data set that people know the task by; where lm-eval reads another data set with the same
content (BoolQ inside SuperGLUE, RACE by article), `convert` turns one into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Kind = type | tuple[type, ...]


@dataclass(frozen=True)
class DataRow:
    """One row of a data file, and its place for errors."""

    file: str
    number: int
    row: Row

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.number}"


@dataclass(frozen=True)
class Layout:
    """Layout of the rows of one data set."""

    files: tuple[str, ...]  # names before ".split.jsonl"
    columns: Mapping[str, Kind]  # "choices.text": inside the object `choices`
    convert: Callable[[list[DataRow]], list[DataRow]] = field(default=lambda lines: lines)
    optional: frozenset[str] = frozenset()  # columns that the data set itself leaves empty in places


def _each(change: Callable[[Row], Row]) -> Callable[[list[DataRow]], list[DataRow]]:
    return lambda lines: [DataRow(line.file, line.number, change(line.row)) for line in lines]


def _boolq(row: Row) -> Row:
    """google/boolq (`answer`, true or false) as aps/super_glue has it (`label`, 1 or 0)."""
    return {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}


def _truthfulqa(row: Row) -> Row:
    """The authors' mc_task.json (answers as keys, 1 or 0 as values) as the hub has it (`choices` and `labels`)."""

    def lists(targets: Mapping[str, Any]) -> Row:
        if set(targets) == {"choices", "labels"} and isinstance(targets["choices"], list):
            return dict(targets)
        return {"choices": list(targets), "labels": [int(value) for value in targets.values()]}

    return {**row, "mc1_targets": lists(row["mc1_targets"]), "mc2_targets": lists(row["mc2_targets"])}


def _race(lines: list[DataRow]) -> list[DataRow]:
    """ehovy/race (a row a question) as EleutherAI/race (a row an article, `problems` as Python text); rows in that form stay."""
    articles: dict[str, list[DataRow]] = {}
    for line in lines:
        articles.setdefault(line.row["article"], []).append(line)
    result = []
    for article, asked in articles.items():
        if "problems" in asked[0].row:
            result.extend(asked)
            continue
        problems = [{key: line.row[key] for key in ("question", "answer", "options")} for line in asked]
        result.append(DataRow(asked[0].file, asked[0].number, {"article": article, "problems": repr(problems)}))
    return result


_ARC: Mapping[str, Kind] = {"question": str, "choices.text": list, "choices.label": list, "answerKey": str}

# By lm-eval's task name; the subjects of MMLU share one.
LAYOUTS: Mapping[str, Layout] = {
    "arc_challenge": Layout(("arc_challenge",), _ARC),
    "arc_easy": Layout(("arc_easy",), _ARC),
    "boolq": Layout(("boolq",), {"question": str, "passage": str, "answer": bool}, _each(_boolq)),
    "crows_pairs_english": Layout(("crows_pairs", "crows_pairs_english"), {"sent_more": str, "sent_less": str}),
    "hellaswag": Layout(
        ("hellaswag",),
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)},
        optional=frozenset({"ctx_b"}),
    ),
    "mmlu": Layout(("mmlu",), {"question": str, "subject": str, "choices": list, "answer": int}),
    "piqa": Layout(("piqa",), {"goal": str, "sol1": str, "sol2": str, "label": int}),
    "race": Layout(("race", "race_high"), {"article": str}, _race),
    "sciq": Layout(
        ("sciq",),
        {"question": str, "support": str, "distractor1": str, "distractor2": str, "distractor3": str, "correct_answer": str},
        optional=frozenset({"support"}),
    ),
    "truthfulqa_mc2": Layout(
        ("truthfulqa_mc", "truthfulqa_mc2", "truthfulqa"), {"question": str, "mc1_targets": dict, "mc2_targets": dict}, _each(_truthfulqa)
    ),
    "wikitext": Layout(("wikitext", "wikitext_2"), {"page": str}),
    "winogrande": Layout(("winogrande_xl", "winogrande"), {"sentence": str, "option1": str, "option2": str, "answer": str}),
}
