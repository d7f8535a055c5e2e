"""Accuracy that other weights cost a model, before any artifact is written: the bundled cloze task, in torch, paired item by item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from calibration.mixed import AccuracyDrop, Half
from elmexport.checkpoint import open_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.evaluation.comparison import compare_task
from elmexport.evaluation.results import TaskResult
from elmexport.evaluation.tasks.presets import DEFAULT_TASK
from elmexport.progress import Progress
from elmexport.runtimes.torch import TorchRuntime

if TYPE_CHECKING:
    from elmexport.evaluation.tasks.documents import Document


class TaskDrop:
    """Paired comparison with a model whose weights are rounded to fp16: the reference of `elmexport eval`.

    A model is in memory as a whole, in float32, while it answers.
    """

    def __init__(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """
        Raises:
            ElmExportError: a model without a tokenizer, or weights that fp16 cannot hold.
        """
        tokenizer = open_tokenizer(checkpoint)
        if tokenizer is None:
            raise ElmExportError(
                f"--max-drop measures accuracy on a text, and {checkpoint.source.name} has no tokenizer to read it with; "
                "pass one with --tokenizer PATH, or give a size with --bits-per-weight"
            )
        from elmexport.evaluation.tasks.documents import build_documents
        from elmexport.evaluation.tasks.local import quiet
        from elmexport.evaluation.tasks.suite import load_suites

        self._tokenizer = tokenizer
        with quiet():
            (self._suite,) = load_suites({DEFAULT_TASK: None}, None)
            documents = build_documents(self._suite, None, 0)
        # Alternating fours: in the bundled task the right answer is at each of four places in turn.
        self._documents: dict[Half, list[Document]] = {
            "search": [document for number, document in enumerate(documents) if number // 4 % 2 == 0],
            "report": [document for number, document in enumerate(documents) if number // 4 % 2],
        }
        self._progress = progress
        self._references = {
            half: self._answers(checkpoint, half, torch.float16, f"{checkpoint.source.name} fp16") for half in self._documents
        }

    def measure(self, checkpoint: Checkpoint, half: Half, label: str) -> AccuracyDrop:
        """Measure the accuracy that the weights of `checkpoint` cost on one half of the items. `label` is shown while it answers."""
        result = compare_task(DEFAULT_TASK, self._answers(checkpoint, half, None, label), self._references[half])
        found = result.comparison
        assert found is not None and found.drop is not None
        return AccuracyDrop(DEFAULT_TASK, result.n, found.drop, found.drop_ci, found.detectable_drop)

    def _answers(self, checkpoint: Checkpoint, half: Half, rounded_to: torch.dtype | None, label: str) -> TaskResult:
        from elmexport.evaluation.lm import RuntimeLM
        from elmexport.evaluation.tasks.documents import task_result
        from elmexport.evaluation.tasks.local import quiet

        documents = self._documents[half]
        requests = [instance for document in documents for instance in document.instances]
        self._progress.stage(f"{DEFAULT_TASK}, {label}", len(requests))
        lm = RuntimeLM(TorchRuntime(checkpoint, rounded_to=rounded_to), self._tokenizer)
        lm.set_cache_hook(_Hook(self._progress))
        with quiet():
            answers = lm.loglikelihood(requests, disable_tqdm=True)
            by_instance = {id(instance): answer for instance, answer in zip(requests, answers, strict=True)}
            return task_result(self._suite, documents, lambda instance: by_instance[id(instance)], None)


class _Hook:
    """Counts answers as they come."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add_partial(self, *_: Any) -> None:
        self._progress.advance(1)
