"""An evaluation from end to end: tasks and a text pass on an artifact, on its reference, and the comparison of the two."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmexport.cache import cache_folder
from elmexport.checkpoint import Checkpoint, open_tokenizer
from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.errors import ElmExportError
from elmexport.evaluation.comparison import compare
from elmexport.evaluation.data import LocalData
from elmexport.evaluation.distributions import ReferencePass
from elmexport.evaluation.evaluated_model import FP16, EvaluatedModel, evaluated_artifact, find_reference, fp16_reference
from elmexport.evaluation.results import Evaluation, Report, Subject, TaskResult
from elmexport.evaluation.store import AnswerStore
from elmexport.evaluation.tasks.presets import DEFAULT_TASK, published
from elmexport.evaluation.tasks.suite import TEXT_ALONE, require_lm_eval
from elmexport.evaluation.text import text_pass
from elmexport.evaluation.windows import DEFAULT_TOKENS, Windows, text_windows
from elmexport.progress import Progress, SilentProgress
from elmexport.runtimes import artifact_kind, engine_version
from elmexport.runtimes.artifact_tokenizer import artifact_tokenizer, tokens_fingerprint
from elmexport.runtimes.base import Runtime

if TYPE_CHECKING:
    from elmexport.evaluation.tasks.documents import Document
    from elmexport.evaluation.tasks.suite import Suite

STORE_FORMAT = 3  # of the kept answers; raised when the same request would be answered otherwise


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation. `tasks` are names with a number of few-shot examples each, None for the task's own number."""

    tasks: Mapping[str, int | None]
    limit: int | None = None  # documents of each task
    seed: int = 0  # of their choice
    data: Path | None = None  # folder of JSONL files; None: the hub
    text: Path | None = None  # of the text pass; None: the bundled prose
    text_tokens: int = DEFAULT_TOKENS  # 0: no text pass


def evaluate(
    artifact: Path,
    settings: Settings | None = None,
    *,
    against: str | None = FP16,
    adapter: Path | None = None,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Evaluate `artifact`, and compare it with `against`: "fp16", the model it was made from, another artifact's path, or None.

    `adapter` is merged into the model: the one that the artifact was exported with.
    `settings`: by default the bundled cloze task and text, which need no download. Answers are kept in `elmexport.cache.cache_folder()` as they
    come: an interrupted evaluation goes on where it ended. `note` receives, in words, what is not as one might expect.

    Raises:
        ElmExportError: unknown tasks, rows that are missing, damaged or empty, models that cannot be compared.
        VerificationError: the artifact gives values that are not finite.
        MissingDependencyError: an engine, or for tasks lm-eval, is not installed, or the hub cannot be reached.
    """
    settings = settings or Settings({DEFAULT_TASK: None})
    if settings.tasks:
        require_lm_eval(TEXT_ALONE)
    progress = progress or SilentProgress()
    started = time.monotonic()
    evaluated = evaluated_artifact(artifact, progress)
    reference = None if against is None else find_reference(artifact, against, adapter=adapter, progress=progress)
    chosen = artifact_tokenizer(artifact_kind(artifact), artifact, tokenizer)
    tasks, notes = _prepare(settings, progress)
    for line in notes:
        note(line)

    progress.stage(f"opening {evaluated.subject.label}")
    with _Opened(evaluated) as ours:
        context, vocab_size = ours.runtime().context, ours.runtime().vocab_size
        windows = None
        if settings.text_tokens:
            windows = text_windows(chosen, vocab_size, context, path=settings.text, tokens=settings.text_tokens)
        results = _answer(ours, context, chosen, tasks, progress, chosen.fingerprint())
        shortened = sum(_too_long(instance, chosen, context) for _, documents in tasks for doc in documents for instance in doc.instances)
        if shortened:
            notes.append(f"{shortened} requests are longer than the context of {context} tokens and lost their beginning")
            note(notes[-1])
        others, distributions = None, None
        if reference is not None:
            with _Opened(reference, before=ours.close) as theirs:  # large models do not fit in memory together
                others = _answer(theirs, context, chosen, tasks, progress, tokens_fingerprint(chosen))
                if windows is not None:
                    distributions = _reference_pass(theirs)
                    distributions.windows(windows, vocab_size, progress)
                    theirs.close()
                text = None if windows is None else text_pass(ours.runtime(), windows, distributions, progress)
        else:
            text = None if windows is None else text_pass(ours.runtime(), windows, None, progress)
    described = _described(settings, tasks, windows, notes)
    seconds = time.monotonic() - started
    own = Evaluation(evaluated.subject, described, results, text, seconds)
    other = None if reference is None or others is None else Evaluation(reference.subject, described, others, None, seconds)
    return compare(own, other, lm_eval=_lm_eval_version() if tasks else None)


def evaluate_reference(checkpoint: Checkpoint, context: int, settings: Settings, progress: Progress | None = None) -> None:
    """Evaluate the fp16 reference of `checkpoint` with a context of `context` tokens, before any artifact is there.

    Answers and distributions are left in the cache, where `evaluate` finds them, whatever format the artifact has.

    Raises:
        ElmExportError: a model without a tokenizer, or see `evaluate`.
    """
    progress = progress or SilentProgress()
    reference = fp16_reference(checkpoint, context, progress)
    chosen = open_tokenizer(checkpoint)
    if chosen is None:
        raise ElmExportError(f"{checkpoint.source.name} has no tokenizer to read tasks and texts with; name one for it")
    vocab_size = checkpoint.config.dims.vocab_size
    tasks, _ = _prepare(settings, progress)
    with _Opened(reference) as opened:
        _answer(opened, context, chosen, tasks, progress, tokens_fingerprint(chosen))
        if settings.text_tokens:
            windows = text_windows(chosen, vocab_size, context, path=settings.text, tokens=settings.text_tokens)
            _reference_pass(opened).windows(windows, vocab_size, progress)


class _Opened:
    """An evaluated model's runtime, opened when it is first needed, and again after it was closed."""

    def __init__(self, evaluated: EvaluatedModel, before: Callable[[], None] = lambda: None) -> None:
        self.evaluated = evaluated
        self._before = before
        self._runtime: Runtime | None = None

    def runtime(self) -> Runtime:
        if self._runtime is None:
            self._before()
            self._runtime = self.evaluated.open_runtime()
        return self._runtime

    def close(self) -> None:
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


TaskList = Sequence[tuple["Suite", Sequence["Document"]]]


def _prepare(settings: Settings, progress: Progress) -> tuple[TaskList, list[str]]:
    """Load the tasks with their documents, and notes on them."""
    if not settings.tasks:
        return [], []
    progress.stage("tasks", len(settings.tasks))
    from elmexport.evaluation.tasks.documents import build_documents
    from elmexport.evaluation.tasks.local import quiet
    from elmexport.evaluation.tasks.suite import load_suites

    data = None if settings.data is None else LocalData(settings.data)
    tasks = []
    with quiet():
        for suite in load_suites(settings.tasks, data):
            tasks.append((suite, build_documents(suite, settings.limit, settings.seed)))
            progress.advance(1)
    return tasks, [f"{suite.name}: {line}" for suite, _ in tasks for line in suite.notes]


def _reference_pass(opened: _Opened) -> ReferencePass:
    return ReferencePass(opened.evaluated.subject.identity, opened.runtime, cache_folder() / "distributions")


def _answer(
    opened: _Opened, context: int, tokenizer: Tokenizer, tasks: TaskList, progress: Progress, fingerprint: str
) -> dict[str, TaskResult]:
    """The results of one model; `fingerprint` stands for the tokenizer in the name of its answers."""
    if not tasks:
        return {}
    from elmexport.evaluation.lm import RuntimeLM
    from elmexport.evaluation.tasks.documents import task_result
    from elmexport.evaluation.tasks.local import quiet

    subject = opened.evaluated.subject
    folder = cache_folder() / "answers" / _store_name(subject, context, fingerprint)
    stores = [AnswerStore(folder / f"{suite.name}-{suite.fewshot}shot.jsonl", lambda: progress.advance(1)) for suite, _ in tasks]
    asked = [_requests(documents) for _, documents in tasks]
    unanswered = [
        {kind: [one for one in requests if store.get(kind, one.args) is None] for kind, requests in kinds.items()}
        for kinds, store in zip(asked, stores, strict=True)
    ]
    progress.stage(subject.label, sum(len(requests) for kinds in unanswered for requests in kinds.values()))
    results = {}
    for (suite, documents), store, kinds, left in zip(tasks, stores, asked, unanswered, strict=True):
        with store, quiet():
            for kind in (kind for kind in kinds if left[kind]):
                lm = RuntimeLM(opened.runtime(), tokenizer, partial(store.get, kind))
                lm.set_cache_hook(store)
                # Log-likelihoods are read in the company of those that are known already; the other kinds are answered one by one.
                getattr(lm, kind)(kinds[kind] if kind == "loglikelihood" else left[kind], disable_tqdm=True)

            def answer(instance: Any, store: AnswerStore = store) -> Any:
                return store.get(instance.request_type, instance.args)

            results[suite.name] = task_result(suite, documents, answer, published(subject.model.name, suite.name, suite.fewshot))
    return results


def _requests(documents: Sequence[Document]) -> dict[str, list[Any]]:
    """The requests of `documents`, each once, by kind."""
    found: dict[str, dict[Any, Any]] = {}
    for document in documents:
        for instance in document.instances:
            found.setdefault(instance.request_type, {}).setdefault(repr(instance.args), instance)
    return {kind: list(requests.values()) for kind, requests in found.items()}


def _too_long(instance: Any, tokenizer: Tokenizer, context: int) -> bool:
    if instance.request_type != "loglikelihood" or sum(map(len, instance.args)) <= context:  # a token is a character at least
        return False
    return len(tokenizer.encode("".join(instance.args), parse_special=True)) > context + 1


def _store_name(subject: Subject, context: int, fingerprint: str) -> str:
    """The folder of answers: its name changes with everything that may change one."""
    engine = f"{subject.engine} {engine_version(subject.target)}"
    key = f"{STORE_FORMAT} {subject.identity} {engine} {context} {_lm_eval_version()} {fingerprint}"
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _described(settings: Settings, tasks: TaskList, windows: Windows | None, notes: Sequence[str]) -> dict[str, Any]:
    text = None if windows is None else {"name": windows.text, "windows": len(windows.ids), "window": windows.length, "hash": windows.hash}
    return {
        "tasks": {suite.name: suite.fewshot for suite, _ in tasks},
        "limit": settings.limit,
        "seed": settings.seed,
        "data": "hub" if settings.data is None else "local",
        "text": text,
        "notes": list(notes),
    }


def _lm_eval_version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
