"""lm-eval as its own users run it: its Hugging Face backend over an independent model, its stock tasks, rows under the hub's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
import pytest
from lm_eval.models.huggingface import HFLM
from transformers import LlamaTokenizer

from elmexport.models.openelm.catalog import TINY_FOLDER
from tests.evaluation.huggingface import ReferenceModel

ROWS = Path(__file__).parent / "data"
SUBJECTS = ("clinical_knowledge", "conceptual_physics", "electrical_engineering")
# What the stock definitions call the data sets, and the files with their rows; MMLU's are named after its subjects.
HUB = {
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("aps/super_glue", "boolq"): "boolq",
    ("jannalu/crows_pairs_multilingual", "english"): "crows_pairs",
    ("Rowan/hellaswag", None): "hellaswag",
    ("baber/piqa", None): "piqa",
    ("EleutherAI/race", "high"): "race",
    ("allenai/sciq", None): "sciq",
    ("truthfulqa/truthful_qa", "multiple_choice"): "truthfulqa_mc",
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): "wikitext",
    ("allenai/winogrande", "winogrande_xl"): "winogrande_xl",
}
OWN_SPLIT = {"crows_pairs": "test", "truthfulqa_mc": "validation"}  # files that name no split
FOLDERS = (
    "arc",
    "super_glue/boolq",
    "crows_pairs",
    "hellaswag",
    "mmlu/default",
    "piqa",
    "race",
    "sciq",
    "truthfulqa",
    "wikitext",
    "winogrande",
)


def load_rows(folder: Path, path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
    """In place of `datasets.load_dataset`: the rows in `folder` as the hub has them."""
    stem = "mmlu" if path == "cais/mmlu" else HUB[path, name]
    splits = {}
    for file in folder.glob(f"{stem}.*jsonl"):
        split = file.name.split(".")[1] if file.name.count(".") == 2 else OWN_SPLIT[stem]
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        splits[split] = datasets.Dataset.from_list([_as_on_hub(stem, row) for row in rows if stem != "mmlu" or row["subject"] == name])
    for split in ("train", "validation", "test"):  # the stock tasks open all of a data set's splits, those that they do not use too
        splits.setdefault(split, next(iter(splits.values())))
    return datasets.DatasetDict(splits)


def _as_on_hub(stem: str, row: dict[str, Any]) -> dict[str, Any]:
    if stem == "boolq":
        return {**row, "label": 1 if row["answer"] else 0}
    if stem == "truthfulqa_mc":
        targets = {key: {"choices": list(row[key]), "labels": list(row[key].values())} for key in ("mc1_targets", "mc2_targets")}
        return {"question": row["question"], **targets}
    return row


def backend(checkpoint: Path, folder: Path) -> HFLM:
    """lm-eval's Hugging Face backend over a checkpoint with the vocabulary of `tiny`, of which a copy goes to `folder`."""
    shutil.copy(TINY_FOLDER / "tokenizer.model", folder)
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), add_bos_token=True)
    return HFLM(pretrained=ReferenceModel(checkpoint), tokenizer=tokenizer, add_bos_token=True, batch_size=1)


def stock_results(model: HFLM, names: Sequence[str], fewshot: int, rows: Path = ROWS) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` says, samples included."""
    root = Path(lm_eval.tasks.__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", partial(load_rows, rows))
        results = lm_eval.simple_evaluate(
            model,
            tasks=list(names),
            num_fewshot=fewshot,
            bootstrap_iters=1,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / name for name in FOLDERS]),
        )
    assert results is not None
    return dict(results)
