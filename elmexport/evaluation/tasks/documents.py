"""The documents of a task as requests to a model, and the model's answers as lm-eval's metrics."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elmexport.errors import ElmExportError
from elmexport.evaluation.results import Item, TaskResult
from elmexport.evaluation.tasks.subset import subset
from elmexport.evaluation.tasks.suite import Suite

FEWSHOT_SEED = 1234  # lm-eval's own
SHOWN = 2000  # characters of an item's text that a report keeps

Answer = Any  # (log-likelihood, greedy) of "loglikelihood", a log-likelihood of "loglikelihood_rolling", a text of "generate_until"


@dataclass(frozen=True)
class Document:
    """One document and its requests."""

    id: int  # lm-eval's doc_id; in a group, counted through all of its tasks
    task: Any  # RowTask
    local_id: int  # lm-eval's doc_id within `task`
    doc: Mapping[str, Any]
    instances: Sequence[Any]  # lm_eval.api.instance.Instance
    hash: str
    text: str  # the question without its examples, for a person
    choices: tuple[str, ...]
    target: int | None  # which of them is right


def build_documents(suite: Suite, limit: int | None, seed: int) -> list[Document]:
    """The chosen documents, few-shot examples and all: each as it is in an evaluation of every document.

    Raises:
        ElmExportError: no documents at all, or a row that the task cannot take, or whose right answer is none of its choices.
    """
    total = sum(len(task.task_docs) for task in suite.tasks)
    chosen = set(subset(suite.name, total, limit, seed))
    if not chosen:
        raise ElmExportError(f"{suite.name}: no documents to evaluate; give more rows, or a --limit above 0")
    documents: list[Document] = []
    first = 0
    for task in suite.tasks:
        count = len(task.task_docs)
        documents += _task_documents(task, first, sorted(i - first for i in chosen if first <= i < first + count), suite.fewshot)
        first += count
    return documents


def _task_documents(task: Any, first: int, chosen: Sequence[int], fewshot: int) -> list[Document]:
    if fewshot:
        _check_examples(task, fewshot)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    wanted = set(chosen)
    documents = []
    for doc_id in range(max(chosen, default=-1) + 1):
        if doc_id not in wanted and not fewshot:
            continue
        doc = task.task_docs[doc_id]
        try:
            if doc_id in wanted:
                context = task.fewshot_context(doc, num_fewshot=fewshot, gen_prefix=task.doc_to_prefix(doc))
                made = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, doc_id, 1))
                instances = made if isinstance(made, list) else [made]
                documents.append(Document(first + doc_id, task, doc_id, doc, instances, _hash(instances), *_question(task, doc_id, doc)))
                _check_texts(documents[-1])
            else:  # examples are drawn for one document after the other: a document that is left out takes its draw with it
                task.sampler.sample(n=fewshot, eval_doc=doc if task.fewshot_cfg.split == task.config.test_split else None)
        except ElmExportError:
            raise
        except Exception as error:
            raise ElmExportError(
                f"{task.place(doc_id)}: {task.config.task} cannot make a question of this row with {fewshot} few-shot examples "
                f"({type(error).__name__}: {error}); mend or remove the line, or give more rows for examples"
            ) from error
    return documents


def _check_examples(task: Any, fewshot: int) -> None:
    """
    Raises:
        ElmExportError: fewer rows to draw examples from than are asked for.
    """
    own = task.fewshot_cfg.split == task.config.test_split  # then a question is none of its own examples
    rows = len(list(task.fewshot_docs() or ())) - (1 if own else 0)
    if fewshot > rows:
        raise ElmExportError(
            f"{task.config.task}: {fewshot} few-shot examples are asked for, and there are {max(rows, 0)} rows to draw them from"
            f"{' (those of the questions themselves, without the question)' if own else ''}; pass --fewshot {max(rows, 0)} or fewer, or give more rows"
        )


def _check_texts(document: Document) -> None:
    """
    Raises:
        ElmExportError: a choice, or the text whose likelihood is asked for, is empty: it has none.
    """
    asked = [instance.args[-1] for instance in document.instances if instance.request_type.startswith("loglikelihood")]
    if not all(asked) or not all(choice.strip() for choice in document.choices):
        raise ElmExportError(
            f"{document.task.place(document.local_id)}: {document.task.config.task} asks how likely an empty text is; mend or remove the line"
        )


def task_result(suite: Suite, documents: Sequence[Document], answer: Callable[[Any], Answer], published: float | None) -> TaskResult:
    """lm-eval's metrics of `documents`, each and together; `answer` gives the model's to an instance."""
    raw: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    items = []
    for document in documents:
        metrics = _metrics(document, [answer(instance) for instance in document.instances])
        for name, value in metrics.items():
            raw[document.task.config.task][name].append(value)
        items.append(_item(document, metrics, [answer(instance) for instance in document.instances]))
    metrics, stderr = _aggregate(suite, raw)
    metric = suite.metric()
    return TaskResult(
        metrics=metrics,
        n=len(items),
        fewshot=suite.fewshot,
        metric=metric,
        higher_is_better=bool(suite.tasks[0].higher_is_better().get(metric, True)),
        stderr=stderr,
        items=tuple(items),
        published=published,
    )


def _metrics(document: Document, answers: Sequence[Answer]) -> dict[str, Any]:
    task, result = document.task, {}
    for instance, answer in zip(document.instances, answers, strict=True):
        instance.resps, instance.filtered_resps = [answer], {}
    task._instances = list(document.instances)
    task.apply_filters()
    for number, key in enumerate(document.instances[0].filtered_resps):
        found = task.process_results(document.doc, [instance.filtered_resps[key] for instance in document.instances])
        # a task with several filters has each metric once for every filter: the first keeps the bare name
        result.update({name if number == 0 else f"{name},{key}": value for name, value in found.items()})
    return result


def _aggregate(suite: Suite, raw: Mapping[str, Mapping[str, Sequence[Any]]]) -> tuple[dict[str, float], dict[str, float]]:
    """lm-eval's aggregation and its standard errors, of one task or of a group."""
    from lm_eval.api.group import Group
    from lm_eval.api.metrics import mean, stderr_for_metric

    def single(values: Mapping[str, Sequence[Any]], task: Any) -> tuple[dict[str, float], dict[str, float]]:
        found: dict[str, float] = {}
        errors: dict[str, float] = {}
        for name, entries in values.items():
            aggregation = task.aggregation().get(name.split(",")[0], mean)
            found[name] = float(aggregation(entries))
            # only the error of a mean: lm-eval resamples for the others, which takes minutes
            estimate = stderr_for_metric(metric=aggregation, bootstrap_iters=1) if aggregation is mean else None
            if estimate is not None and len(entries) > 1:
                errors[name] = float(estimate(entries))
        return found, errors

    together: dict[str, list[Any]] = defaultdict(list)
    for values in raw.values():
        for name, entries in values.items():
            together[name] += entries
    pooled, stderr = single(together, suite.tasks[0])
    if suite.group is None or not suite.group.get("aggregate_metric_list"):
        return pooled, stderr
    # lm-eval's own way to put the parts together, over those of which there are documents
    group = Group.from_config(dict(suite.group))
    leaves = {}
    for task in suite.tasks:
        scored = raw.get(task.config.task)
        if scored:
            group.add(task)
            own, errors = single(scored, task)
            numbers = {f"{name},none": value for name, value in own.items()} | {
                f"{name}_stderr,none": errors.get(name, "N/A") for name in own
            }
            leaves[task.config.task] = {"sample_len": max(map(len, scored.values())), **numbers}
    found = group.aggregate(leaves)
    metrics = {name: float(found[f"{name},none"]) for name in pooled if f"{name},none" in found}
    for name in metrics:
        if isinstance(found.get(f"{name}_stderr,none"), float):  # "N/A" where a part has a single document: then that of the pool stays
            stderr[name] = found[f"{name}_stderr,none"]
    return metrics, {name: stderr[name] for name in metrics if name in stderr}


def _item(document: Document, metrics: Mapping[str, Any], answers: Sequence[Answer]) -> Item:
    aggregation = document.task.aggregation()
    return Item(
        id=document.id,
        hash=document.hash,
        metrics={
            name: float(value) if not isinstance(value, tuple | list) else float(aggregation[name.split(",")[0]]([value]))
            for name, value in metrics.items()
        },
        scores=tuple(_loglikelihood(answer) for answer in answers if not isinstance(answer, str)),
        text=document.text[:SHOWN],
        choices=document.choices,
        target=document.target,
    )


def _question(task: Any, doc_id: int, doc: Mapping[str, Any]) -> tuple[str, tuple[str, ...], int | None]:
    """What a person would want to see of an item: the question without its examples, the choices, and which one is right."""
    if task.OUTPUT_TYPE != "multiple_choice":
        shown = task.doc_to_target(doc) if task.OUTPUT_TYPE == "loglikelihood_rolling" else task.doc_to_text(doc)
        return str(shown), (), None
    choices = tuple(task.doc_to_choice(doc))
    strange = [choice for choice in choices if not isinstance(choice, str)]
    if strange:
        raise ElmExportError(f"{task.place(doc_id)}: a choice is {strange[0]!r}, not a text; mend or remove the line")
    if task.multiple_input:  # the choices come first, and go on in the same words
        text, target = f"… {task.doc_to_target(doc)}", task.doc_to_text(doc)
    else:
        text, target = str(task.doc_to_text(doc)), task.doc_to_target(doc)
    if isinstance(target, str) and target in choices:
        target = choices.index(target)
    if not isinstance(target, int) or not 0 <= target < len(choices):
        if isinstance(target, list):
            return text, choices, None
        raise ElmExportError(
            f"{task.place(doc_id)}: the right answer is {target!r}, but there are {len(choices)} choices; mend or remove the line"
        )
    return text, choices, target


def _loglikelihood(answer: Answer) -> float:
    return float(answer[0]) if isinstance(answer, tuple | list) else float(answer)


def _hash(instances: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([instance.args for instance in instances], ensure_ascii=False).encode()).hexdigest()
