"""Accuracy that other weights cost a model, before any artifact is written: the bundled cloze task, in torch, paired item by item."""

from __future__ import annotations

from typing import Any

import torch

from calibration.mixed import AccuracyDrop
from elmexport.checkpoint import open_tokenizer
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.evaluation.comparison import compare_task
from elmexport.evaluation.results import TaskResult
from elmexport.evaluation.tasks.presets import DEFAULT_TASK
from elmexport.progress import Progress
from elmexport.runtimes.torch import TorchRuntime


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
            self._documents = build_documents(self._suite, None, 0)
        self._progress = progress
        self._reference = self._answers(checkpoint, torch.float16, f"{checkpoint.source.name} fp16")

    def measure(self, checkpoint: Checkpoint, label: str) -> AccuracyDrop:
        """Measure the accuracy that the weights of `checkpoint` cost. `label` is shown while it answers."""
        result = compare_task(DEFAULT_TASK, self._answers(checkpoint, None, label), self._reference)
        found = result.comparison
        assert found is not None and found.drop is not None
        return AccuracyDrop(DEFAULT_TASK, result.n, found.drop, found.drop_ci, found.detectable_drop)

    def _answers(self, checkpoint: Checkpoint, rounded_to: torch.dtype | None, label: str) -> TaskResult:
        from elmexport.evaluation.lm import RuntimeLM
        from elmexport.evaluation.tasks.documents import task_result
        from elmexport.evaluation.tasks.local import quiet

        requests = [instance for document in self._documents for instance in document.instances]
        self._progress.stage(f"{DEFAULT_TASK}, {label}", len(requests))
        lm = RuntimeLM(TorchRuntime(checkpoint, rounded_to=rounded_to), self._tokenizer)
        lm.set_cache_hook(_Hook(self._progress))
        with quiet():
            answers = lm.loglikelihood(requests, disable_tqdm=True)
            by_instance = {id(instance): answer for instance, answer in zip(requests, answers, strict=True)}
            return task_result(self._suite, self._documents, lambda instance: by_instance[id(instance)], None)


class _Hook:
    """Counts answers as they come."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add_partial(self, *_: Any) -> None:
        self._progress.advance(1)
