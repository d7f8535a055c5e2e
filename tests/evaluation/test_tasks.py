from __future__ import annotations

import re
import subprocess
import sys

import pytest

from elmexport.cli.eval_options import Preset
from elmexport.errors import ElmExportError
from elmexport.evaluation.data import LocalData
from elmexport.evaluation.tasks.documents import build_documents
from elmexport.evaluation.tasks.presets import chosen_tasks, preset, published
from elmexport.evaluation.tasks.subset import subset
from elmexport.evaluation.tasks.suite import FOLDERS, METRICS, check_names, load_suites
from elmexport.models import known_models
from tests.evaluation.lm_eval_backend import ROWS


def test_a_smaller_limit_is_part_of_a_larger_one() -> None:
    small, large = (set(subset("arc_easy", 500, limit, 0)) for limit in (20, 100))
    assert len(small) == 20 and small < large
    assert small != set(subset("arc_easy", 500, 20, 1))
    assert small != set(subset("boolq", 500, 20, 0))
    assert subset("arc_easy", 5, None, 0) == subset("arc_easy", 5, 9, 0) == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_easy", "winogrande", "mmlu"])
def test_limited_documents_are_those_of_the_whole_task(name: str) -> None:
    """Few-shot examples included, although lm-eval draws them one document after the other."""

    def hashes(limit: int | None) -> dict[int, str]:
        (suite,) = load_suites({name: 3}, LocalData(ROWS))
        return {document.id: document.hash for document in build_documents(suite, limit, 0)}

    whole = hashes(None)
    assert len(set(whole.values())) == len(whole)
    for limit in (1, 3):
        limited = hashes(limit)
        assert len(limited) == limit and limited.items() <= whole.items()


@pytest.mark.slow
def test_cloze_is_bundled_and_sound() -> None:
    (suite,) = load_suites({"cloze": None}, None)
    documents = build_documents(suite, None, 0)
    assert len(documents) >= 200
    right = [document.target for document in documents]
    for choice in range(4):
        assert 0.2 < right.count(choice) / len(right) < 0.3  # no place is favoured
    for document in documents:
        assert len(set(document.choices)) == 4
        words = [len(choice.split()) for choice in document.choices]
        assert min(words) == max(words)


def test_every_preset_task_is_known_and_every_published_model_too() -> None:
    openelm = {model.name for model in known_models() if model.name.startswith("OpenELM")} - {"OpenELM-tiny"}
    tables = {"zero-shot": openelm, "llm360": openelm, "openllm": openelm, "olmes": {"OLMoE-1B-7B-0924"}}
    assert list(tables) == [name.value for name in Preset]
    for table, names in tables.items():
        assert set(preset(table)) <= set(FOLDERS) == set(METRICS)
        for model in names:
            assert all(published(model, task, shots or 0) is not None for task, shots in preset(table).items())


def test_published_figures() -> None:
    assert published("OpenELM-270M", "arc_easy", 0) == 45.08
    assert published("OpenELM-3B-Instruct", "crows_pairs_english", 25) == 72.33
    assert published("OpenELM-450M", "winogrande", 0) == 58.01
    assert published("OpenELM-450M", "winogrande", 5) == 57.22
    assert published("OpenELM-450M", "winogrande", 3) is None
    assert published("OpenELM-tiny", "cloze", 0) is None
    assert published("OLMoE-1B-7B-0924", "mmlu", 5) == 54.1
    assert published("OLMoE-1B-7B-0924-Instruct", "mmlu", 5) is None


def test_choosing_tasks() -> None:
    assert chosen_tasks(None, None, None) == {"cloze": None}
    assert chosen_tasks("none", None, None) == {}
    assert chosen_tasks("arc_easy, piqa", None, 5) == {"arc_easy": 5, "piqa": 5}
    assert chosen_tasks("mmlu,winogrande", "llm360", None) == {"mmlu": 5, "winogrande": 5}
    assert len(chosen_tasks(None, "zero-shot", None)) == 7
    for arguments, message in (
        (("a,a", None, None), "names a task twice"),
        (("a,,b", None, None), "names a task twice or not at all"),
        (("boolq", "llm360", None), "has no boolq; its tasks are arc_challenge"),
        ((None, "llm360", 3), "sets the few-shot examples itself"),
        ((None, "llm361", None), "no preset is called 'llm361'"),
    ):
        with pytest.raises(ElmExportError, match=re.escape(message)):
            chosen_tasks(*arguments)  # type: ignore[arg-type]


def test_unknown_names_are_found_without_lm_eval() -> None:
    """Importing it takes seconds."""
    code = (
        "import sys\n"
        "from elmexport.errors import ElmExportError\n"
        "from elmexport.evaluation.tasks.suite import check_names\n"
        "check_names(['cloze', 'piqa', 'lambada_openai'])\n"
        "try: check_names(['piqa', 'mmlu_antomy'])\n"
        "except ElmExportError as error: print(error)\n"
        "print('lm_eval' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    error, imported = done.stdout.splitlines()
    assert error.startswith("no task is called 'mmlu_antomy'; did you mean mmlu_anatomy") and imported == "False"


@pytest.mark.slow
def test_no_task_of_lm_eval_counts_as_unknown() -> None:
    from lm_eval.tasks import TaskManager

    names = TaskManager().all_tasks
    assert len(names) > 1000
    check_names(names)
