"""A report with something in every place, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from elmexport.evaluation.results import (
    Blocks,
    DepthBucket,
    Evaluation,
    Flips,
    Gate,
    Item,
    ItemScores,
    KlSummary,
    ModelFacts,
    PerplexitySummary,
    Report,
    Subject,
    TaskComparison,
    TaskResult,
)


def example_subject(label: str = "OpenELM-tiny-onnx-int4", quant: str = "int4") -> Subject:
    model = ModelFacts("OpenELM-tiny", "0" * 64)
    return Subject(label, f"somewhere/{label}", "onnx", "onnxruntime", quant, "4-bit integers, blocks of 32", 5.3, 12345, "1" * 64, model)


def example_report() -> Report:
    items = tuple(
        Item(
            id=i,
            hash=f"h{i}",
            metrics={"acc": float(i % 2), "acc_norm": float(i > 1)},
            scores=(-1.5 - i, -2.25),
            text=f"Question {i}?",
            choices=("yes", "no"),
            target=i % 2,
            reference=ItemScores({"acc": 1.0, "acc_norm": 1.0}, (-1.0, -2.0)),
        )
        for i in range(4)
    )
    task = TaskResult(
        metrics={"acc": 0.5, "acc_norm": 0.5},
        n=4,
        fewshot=0,
        metric="acc_norm",
        higher_is_better=True,
        stderr={"acc": 0.28, "acc_norm": 0.28},
        items=items,
        published=53.6,
        comparison=TaskComparison(
            reference={"acc": 1.0, "acc_norm": 1.0},
            drop=50.0,
            drop_ci=(-12.5, 85.0),
            ci_method="Newcombe's paired interval",
            flips=Flips(2, 0),
            mcnemar_p=0.5,
            detectable_drop=99.0,
            ratio=None,
            ratio_ci=None,
        ),
    )
    return Report(
        lm_eval="0.4.13",
        artifact=example_subject(),
        reference=example_subject("OpenELM-tiny", "fp16 reference"),
        settings={"tasks": {"arc_easy": 0}, "limit": 4, "seed": 0, "data": "local", "text": {"tokens": 1024}},
        tasks={"arc_easy": task},
        kl=KlSummary(0.01, (0.008, 0.012), 0.006, 0.09, 0.3, 0.97, 510, "bundled prose", (DepthBucket(0, 64, 0.011, 0.1, 128),)),
        perplexity=PerplexitySummary(21.5, 21.0, 1.0238, (1.01, 1.04), 510, "bundled prose"),
        blocks=Blocks("2" * 64, (32, 31), (98.5, 95.0), (98.0, 94.5), (0.3, 0.31)),
        gates=(Gate("max-drop", 1.0, 50.0, "arc_easy", False, "arc_easy: 50.0 points dropped, 1.0 allowed"),),
        seconds=12.5,
    )


def example_task(
    values: Sequence[float], *, metric: str = "acc", higher_is_better: bool = True, first: int = 0, fewshot: int = 0
) -> TaskResult:
    """A task whose items have `values` for `metric`, numbered from `first`."""
    items = tuple(Item(i, f"h{i}", {metric: float(value)}, (-1.0,), "", (), None) for i, value in enumerate(values, start=first))
    return TaskResult({metric: fmean(values)}, len(items), fewshot, metric, higher_is_better, {}, items)


def example_evaluation(tasks: Mapping[str, TaskResult], label: str = "OpenELM-tiny-onnx-int4") -> Evaluation:
    return Evaluation(example_subject(label), {"tasks": {name: task.fewshot for name, task in tasks.items()}}, tasks, None, 1.0)
