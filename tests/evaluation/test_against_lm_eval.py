"""Our figures are lm-eval's own: every task, every item, with and without few-shot examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from elmexport.checkpoint.base import Checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.evaluation.data import LocalData
from elmexport.evaluation.lm import RuntimeLM
from elmexport.evaluation.results import TaskResult
from elmexport.evaluation.tasks.documents import build_documents, task_result
from elmexport.evaluation.tasks.suite import FOLDERS, load_suites
from elmexport.models.openelm.catalog import TINY_FOLDER
from elmexport.runtimes.torch import TorchRuntime
from tests.evaluation.lm_eval_backend import ROWS, SUBJECTS, backend, stock_results
from tests.evaluation.wide import Wide

TASKS = sorted(set(FOLDERS) - {"mmlu"})


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's results by number of few-shot examples."""
    model = backend(TINY_FOLDER, tmp_path_factory.mktemp("vocabulary"))
    return cache(lambda fewshot: stock_results(model, [*TASKS, *(f"mmlu_{s}" for s in SUBJECTS)], fewshot))


@pytest.fixture(scope="module")
def ours(tiny: Checkpoint) -> Any:
    """Our results by number of few-shot examples."""
    assert tiny.tokenizer_path is not None
    lm = RuntimeLM(TorchRuntime(tiny), load_tokenizer(tiny.tokenizer_path))

    return cache(lambda fewshot: our_results(lm, dict.fromkeys((*TASKS, "mmlu"), fewshot), ROWS))


def our_results(lm: RuntimeLM, fewshot: Mapping[str, int | None], rows: Path) -> dict[str, TaskResult]:
    results = {}
    for suite in load_suites(fewshot, LocalData(rows)):
        documents = build_documents(suite, None, 0)
        instances = [instance for document in documents for instance in document.instances]
        answers = dict(zip(map(id, instances), getattr(lm, instances[0].request_type)(instances, disable_tqdm=True), strict=True))
        results[suite.name] = task_result(suite, documents, lambda instance, known=answers: known[id(instance)], None)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("fewshot", [0, 3])
@pytest.mark.parametrize("name", TASKS)
def test_task_agrees_item_by_item(stock: Any, ours: Any, name: str, fewshot: int) -> None:
    theirs, mine = stock(fewshot), ours(fewshot)[name]
    for metric, value in mine.metrics.items():
        exact = metric in ("acc", "acc_norm", "pct_stereotype") and name != "truthfulqa_mc2"
        assert value == pytest.approx(theirs["results"][name][f"{metric},none"], rel=0 if exact else 1e-5, abs=0)
    assert_same_items(mine, theirs["samples"][name], 0)
    assert mine.n == theirs["n-samples"][name]["effective"]
    for metric, error in mine.stderr.items():
        assert error == pytest.approx(theirs["results"][name][f"{metric}_stderr,none"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fewshot", [0, 3])
def test_mmlu_pools_its_subjects_by_size(stock: Any, ours: Any, fewshot: int) -> None:
    theirs, mine = stock(fewshot), ours(fewshot)["mmlu"]
    accuracies = [theirs["results"][f"mmlu_{subject}"]["acc,none"] for subject in SUBJECTS]
    sizes = [theirs["n-samples"][f"mmlu_{subject}"]["effective"] for subject in SUBJECTS]
    assert len(set(sizes)) > 1
    assert mine.metrics == {"acc": pytest.approx(sum(a * n for a, n in zip(accuracies, sizes, strict=True)) / sum(sizes), rel=1e-12)}
    first = 0
    by_order = sorted(SUBJECTS, key=lambda subject: mmlu_order(subject))
    for subject in by_order:
        samples = theirs["samples"][f"mmlu_{subject}"]
        assert_same_items(mine, samples, first)
        first += len(samples)
    assert mine.n == first


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    return Wide.make(tmp_path_factory.mktemp("wide"))


@pytest.mark.slow
def test_as_many_examples_as_the_published_tables_have(wide: Wide, tmp_path: Path) -> None:
    """25 examples, in a context that holds them."""
    questions = [file.read_text(encoding="utf-8") for file in sorted(ROWS.glob("arc_*.jsonl"))]
    lines = [line for text in questions for line in text.split("\n") if line]
    train = [json.dumps({**json.loads(line), "id": str(i)}) for i, line in enumerate(2 * lines)]
    assert len(train) > 25
    (tmp_path / "arc_challenge.train.jsonl").write_text("\n".join(train) + "\n", encoding="utf-8")
    (tmp_path / "arc_challenge.test.jsonl").write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    theirs = stock_results(wide.backend, ["arc_challenge"], 25, tmp_path)
    mine = our_results(wide.lm, {"arc_challenge": 25}, tmp_path)["arc_challenge"]
    assert theirs["samples"]["arc_challenge"][0]["arguments"][0][0].count("Question:") == 26
    assert wide.lm.shortened == 0
    assert_same_items(mine, theirs["samples"]["arc_challenge"], 0)
    assert mine.metrics["acc"] == theirs["results"]["arc_challenge"]["acc,none"]
    assert mine.metrics["acc_norm"] == theirs["results"]["arc_challenge"]["acc_norm,none"]


@pytest.mark.slow
def test_mmlu_is_lm_eval_s_group(wide: Wide, tmp_path: Path) -> None:
    """All 57 subjects, of different sizes, with 5 examples as published: the pooled accuracy and its standard error."""
    every = [json.loads(line) for line in (ROWS / "mmlu.test.jsonl").read_text(encoding="utf-8").split("\n") if line]
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    subjects = sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))
    assert len(subjects) == 57
    for split, count in (("test", lambda i: 2 + i % 2), ("dev", lambda i: 5)):
        rows = [json.dumps({**every[(i + k) % len(every)], "subject": s}) for i, s in enumerate(subjects) for k in range(count(i))]
        (tmp_path / f"mmlu.{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    theirs = stock_results(wide.backend, ["mmlu"], 5, tmp_path)
    mine = our_results(wide.lm, {"mmlu": 5}, tmp_path)["mmlu"]
    group = theirs["groups"]["mmlu"]
    assert 0.1 < mine.metrics["acc"] < 0.6
    assert mine.metrics["acc"] == pytest.approx(group["acc,none"], rel=1e-12)
    assert mine.stderr["acc"] == pytest.approx(group["acc_stderr,none"], rel=1e-12)


def mmlu_order(subject: str) -> tuple[int, str]:
    """Where a subject stands in the group: lm-eval lists STEM first, then other, social sciences, humanities."""
    return {"conceptual_physics": 0, "electrical_engineering": 0, "clinical_knowledge": 1}[subject], subject


def assert_same_items(mine: TaskResult, samples: list[dict[str, Any]], first: int) -> None:
    items = {item.id: item for item in mine.items}
    for sample in samples:
        item = items[first + sample["doc_id"]]
        answers = (
            [response[0] for response in sample["filtered_resps"]]
            if isinstance(sample["filtered_resps"][0], list | tuple)
            else sample["filtered_resps"]
        )
        assert item.scores == pytest.approx([float(answer) for answer in answers], rel=1e-4, abs=1e-4)
        for metric, value in item.metrics.items():
            if not isinstance(sample[metric], list | tuple):
                assert value == pytest.approx(sample[metric], rel=1e-4, abs=1e-5)
