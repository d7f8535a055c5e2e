from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from elmexport.errors import ElmExportError
from elmexport.evaluation.data import LocalData
from elmexport.evaluation.layouts import LAYOUTS
from elmexport.evaluation.tasks.documents import build_documents
from elmexport.evaluation.tasks.suite import FOLDERS, Suite, load_suites
from tests.evaluation.lm_eval_backend import ROWS

PIQA = {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Turn the table.", "label": 0}


def write(folder: Path, name: str, rows: Sequence[Any]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(folder: Path, name: str, fewshot: int | None = 0) -> Suite:
    (suite,) = load_suites({name: fewshot}, LocalData(folder))
    return suite


def test_every_task_has_rows_in_the_fixture_and_a_layout() -> None:
    for name in FOLDERS:
        assert LocalData(ROWS).splits(LAYOUTS[name]), name


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"goal": "Open', "piqa.validation.jsonl, line 2: not JSON"),
        ("[1, 2]", "piqa.validation.jsonl, line 2: [1, 2], where an object with columns belongs"),
        ({"goal": "a", "sol1": "b", "label": 1}, "piqa.validation.jsonl, line 2: column sol2 is missing (there are: goal, sol1, label)"),
        ({**PIQA, "label": "0"}, 'piqa.validation.jsonl, line 2: column label is "0", where a whole number belongs'),
        (
            {**PIQA, "sol1": " "},
            'piqa.validation.jsonl, line 2: column sol1 is empty, or holds an empty text: " "; mend or remove the line',
        ),
        ({**PIQA, "label": 7}, "piqa.validation.jsonl, line 2: the right answer is 7, but there are 2 choices"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: Any, message: str) -> None:
    write(tmp_path, "piqa.validation.jsonl", [PIQA, bad])
    with pytest.raises(ElmExportError) as caught:
        build_documents(load(tmp_path, "piqa"), None, 0)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("task", "name", "row", "column"),
    [
        ("crows_pairs_english", "crows_pairs.jsonl", {"sent_more": "", "sent_less": "She is."}, "sent_more"),
        ("wikitext", "wikitext.jsonl", {"page": "\n"}, "page"),
        (
            "hellaswag",
            "hellaswag.validation.jsonl",
            {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", ""], "label": 0},
            "endings",
        ),
        (
            "arc_easy",
            "arc_easy.test.jsonl",
            {"question": "?", "choices": {"text": ["a", ""], "label": ["A", "B"]}, "answerKey": "A"},
            "choices.text",
        ),
        (
            "truthfulqa_mc2",
            "truthfulqa.jsonl",
            {"question": "?", "mc1_targets": {"a": 1, "": 0}, "mc2_targets": {"a": 1, "b": 0}},
            "mc1_targets",
        ),
    ],
)
def test_an_empty_field_is_named(tmp_path: Path, task: str, name: str, row: Any, column: str) -> None:
    """Before anything is computed: such a row was an IndexError or a division by zero in the middle of it."""
    write(tmp_path, name, ["", row])
    with pytest.raises(ElmExportError, match=rf"{name}, line 2: column {column} is empty"):
        load(tmp_path, task)


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "words"), [("", "openbookqa asks how likely an empty text is"), (None, "a choice is None, not a text")])
def test_a_choice_that_has_no_likelihood_in_a_task_without_a_layout_is_named(tmp_path: Path, choice: str | None, words: str) -> None:
    write(
        tmp_path,
        "openbookqa.test.jsonl",
        [
            {"question_stem": "The sun", "choices": {"text": text, "label": ["A", "B", "C", "D"]}, "answerKey": "A"}
            for text in (["a", "b", "c", "d"], ["a", "b", choice, "d"])
        ],
    )
    with pytest.raises(ElmExportError, match=rf"openbookqa\.test\.jsonl, line 2: {words}"):
        build_documents(load(tmp_path, "openbookqa", None), None, 0)


def test_columns_that_the_data_set_leaves_empty(tmp_path: Path) -> None:
    write(tmp_path, "hellaswag.validation.jsonl", [{"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": 0}])
    assert len(build_documents(load(tmp_path, "hellaswag"), None, 0)) == 1


def test_too_many_examples_of_the_bundled_task() -> None:
    (suite,) = load_suites({"cloze": 1000}, None)
    with pytest.raises(ElmExportError, match=r"^cloze: 1000 few-shot examples are asked for, and there are 399 rows"):
        build_documents(suite, 5, 0)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "piqa.validation.jsonl").write_bytes(json.dumps(PIQA).encode() + b'\n{"goal": "\xff"}\n')
    with pytest.raises(ElmExportError, match="line 2: not UTF-8"):
        load(tmp_path, "piqa")


def test_a_row_that_the_prompt_cannot_take_is_named(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (ROWS / "arc_easy.test.jsonl").read_text(encoding="utf-8").split("\n") if line]
    write(tmp_path, "arc_easy.test.jsonl", [*rows[:2], {**rows[2], "answerKey": "Z"}])
    with pytest.raises(ElmExportError, match=r"arc_easy.test.jsonl, line 3: "):
        build_documents(load(tmp_path, "arc_easy"), None, 0)


def test_rows_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match="holds no"):
        LocalData(tmp_path)
    write(tmp_path, "piqa.validation.jsonl", [])
    with pytest.raises(ElmExportError, match="no rows in it"):
        load(tmp_path, "piqa")
    with pytest.raises(ElmExportError, match=r"holds no sciq.SPLIT.jsonl; it has piqa.validation.jsonl"):
        load(tmp_path, "sciq")
    with pytest.raises(ElmExportError, match="is not a folder"):
        LocalData(tmp_path / "absent")


def test_mmlu_without_any_row_is_an_error_and_absent_subjects_are_noted(tmp_path: Path) -> None:
    assert any("54 of 57 parts have no rows" in note for note in load(ROWS, "mmlu").notes)
    write(tmp_path, "mmlu.test.jsonl", [{"question": "?", "subject": "alchemy", "choices": ["a", "b", "c", "d"], "answer": 0}])
    with pytest.raises(ElmExportError, match="no rows for any of its 57 parts"):
        load(tmp_path, "mmlu")


def test_another_split_stands_in_and_is_noted(tmp_path: Path) -> None:
    write(tmp_path, "arc_easy.validation.jsonl", (ROWS / "arc_easy.test.jsonl").read_text(encoding="utf-8").split("\n")[:6])
    suite = load(tmp_path, "arc_easy", fewshot=2)
    assert [note.split(":")[0] for note in suite.notes] == [
        "evaluated on arc_easy.validation.jsonl",
        "few-shot examples come from arc_easy.validation.jsonl",
    ]
    for document in build_documents(suite, None, 0):  # examples come from the evaluated rows, but never the document itself
        assert document.instances[0].args[0].count(document.doc["question"]) == 1


def test_the_splits_that_lm_eval_uses_need_no_note() -> None:
    for name in ("arc_easy", "winogrande", "hellaswag", "sciq"):
        assert load(ROWS, name, fewshot=2).notes == []


def test_too_few_examples(tmp_path: Path) -> None:
    write(tmp_path, "piqa.validation.jsonl", [PIQA] * 3)
    with pytest.raises(
        ElmExportError,
        match=r"piqa: 5 few-shot examples are asked for, and there are 2 rows to draw them from .* pass --fewshot 2 or fewer",
    ):
        build_documents(load(tmp_path, "piqa", fewshot=5), None, 0)


def test_two_files_for_one_split(tmp_path: Path) -> None:
    row = (ROWS / "winogrande_xl.train.jsonl").read_text(encoding="utf-8").split("\n")[0]
    write(tmp_path, "winogrande.validation.jsonl", [row])
    write(tmp_path, "winogrande_xl.validation.jsonl", [row])
    with pytest.raises(ElmExportError, match="both hold validation rows"):
        load(tmp_path, "winogrande")


def test_race_rows_of_one_question_each_become_articles(tmp_path: Path) -> None:
    """ehovy/race's layout gives the requests of EleutherAI/race's."""
    import ast

    rows = []
    for line in (ROWS / "race.test.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        article = json.loads(line)
        rows += [{"article": article["article"], **problem} for problem in ast.literal_eval(article["problems"])]
    write(tmp_path, "race.test.jsonl", rows)
    made, stock = (build_documents(load(folder, "race"), None, 0) for folder in (tmp_path, ROWS))
    assert [document.hash for document in made] == [document.hash for document in stock]


@pytest.mark.slow
def test_unknown_tasks_suggest_the_nearest() -> None:
    with pytest.raises(ElmExportError, match="no task is called 'arc_esay'; did you mean arc_easy"):
        load_suites({"arc_esay": None}, LocalData(ROWS))


def test_tasks_without_room_for_examples_say_so() -> None:
    assert load(ROWS, "truthfulqa_mc2", fewshot=5).notes == ["takes no few-shot examples, so the 5 asked for are left out"]
