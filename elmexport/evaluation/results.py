"""Results of an evaluation: of one artifact (`Evaluation`), and compared with those of a reference (`Report`).

The JSON layout is described in docs/evaluation.md, its schema is `elmexport.evaluation.schema.report_schema`. Shares are between 0 and 1, drops in
percentage points, divergences in nats per token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field, to_builtins

from elmexport import __version__
from elmexport.documents import parse_json, to_struct
from elmexport.errors import ElmExportError
from elmexport.files import write_text

SCHEMA = 1  # of the document; a reader refuses a newer one
FIX = "give a file that elmexport eval wrote"
_AGAIN = "write the report again with this version of elmexport"


class ModelFacts(Struct, frozen=True):
    """The model that an artifact was made from; `identity` is `Checkpoint.identity`, None where the artifact does not say."""

    name: str
    identity: str | None


class Subject(Struct, frozen=True):
    """Identity of an evaluated artifact or model."""

    label: str  # the folder's name
    path: str
    target: str  # "onnx", or "checkpoint" for the model itself
    engine: str  # `Runtime.name`
    quant: str  # "int4", "fp16 reference"
    words: str  # the quantization in words
    bits_per_weight: float | None
    bytes: int | None  # on disk: all files; None for the reference, which is not stored in the precision it is computed in
    identity: str  # SHA-256 that changes with the files
    model: ModelFacts


class ItemScores(Struct, frozen=True):
    """Scores of one model on one item: every metric, and the log-likelihood of each choice in nats."""

    metrics: Mapping[str, float]
    scores: tuple[float, ...]


class Item(Struct, frozen=True):
    """Item, a document of a task, with its scores. Two artifacts' items pair where both `id` and `hash` agree."""

    id: int  # lm-eval's doc_id
    hash: str  # of the item's requests: the same hash, the same question
    metrics: Mapping[str, float]
    scores: tuple[float, ...]
    text: str
    choices: tuple[str, ...]
    target: int | None  # which choice is right
    reference: ItemScores | None = None


class Flips(Struct, frozen=True):
    """Items whose answer was right in one model and wrong in the other."""

    right_to_wrong: int
    wrong_to_right: int


class TaskComparison(Struct, frozen=True):
    """Comparison of one task with the reference; the figures are of the task's `metric`. None: the metric has no such figure."""

    reference: Mapping[str, float]  # its metrics
    drop: float | None  # percentage points, positive where the artifact is worse
    drop_ci: tuple[float, float] | None  # 95 %
    ci_method: str
    flips: Flips | None  # of metrics that are 0 or 1 per item
    mcnemar_p: float | None
    detectable_drop: float | None  # the smallest true drop, in points, that so many items find with a probability of 80 %
    ratio: float | None  # artifact / reference, of metrics that are perplexities
    ratio_ci: tuple[float, float] | None


class TaskResult(Struct, frozen=True):
    """Results of one task. `metrics` holds every metric by lm-eval's name, `metric` names the one that published tables quote."""

    metrics: Mapping[str, float]
    n: int
    fewshot: int
    metric: str
    higher_is_better: bool  # of `metric`
    stderr: Mapping[str, float]
    items: tuple[Item, ...]
    published: float | None = None  # per cent, the authors' own figure for this model, few-shot setting and metric
    comparison: TaskComparison | None = None

    def to_document(self) -> dict[str, Any]:
        """The task as it stands in the document: flat, metrics and comparison beside the other keys."""
        own: dict[str, Any] = to_builtins(self)
        metrics, comparison, items = (own.pop(key) for key in ("metrics", "comparison", "items"))
        return {**metrics, **own, **(comparison or dict.fromkeys(COMPARISON_KEYS)), "items": items}

    @classmethod
    def from_document(cls, document: Any, where: str, root: str) -> TaskResult:
        """Read what `to_document` gave; `where` is the file, `root` the place in it.

        Raises:
            ElmExportError: keys that are missing, or of other types.
        """
        if not isinstance(document, dict):
            return to_struct(document, cls, where, _AGAIN, root=root)  # says what is wrong
        own = {key: document[key] for key in cls.__struct_fields__ if key in document}
        found = {key: value for key, value in document.items() if key not in TASK_KEYS}
        own["metrics"] = to_struct(found, dict[str, float], where, _AGAIN, root=root)
        own["comparison"] = None
        if document.get("reference") is not None:
            own["comparison"] = to_struct(document, TaskComparison, where, _AGAIN, root=root)
        task = to_struct(own, cls, where, _AGAIN, root=root)
        if task.metric not in task.metrics:
            raise ElmExportError(
                f"{where}: {root}.metric is {task.metric!r}, but the task's metrics are {', '.join(task.metrics) or 'none'}; {_AGAIN}"
            )
        return task


COMPARISON_KEYS = TaskComparison.__struct_fields__
TASK_KEYS = {*TaskResult.__struct_fields__, *COMPARISON_KEYS}  # all others are metrics


class DepthBucket(Struct, frozen=True):
    """KL divergence at some depths in the window: tokens read before the prediction, `start` to `end` exclusive."""

    start: int = field(name="from")
    end: int = field(name="to")
    mean: float
    p99: float
    tokens: int


class KlSummary(Struct, frozen=True):
    """KL(reference || artifact) of next-token distributions, nats per token."""

    mean: float
    mean_ci: tuple[float, float]
    median: float
    p99: float
    max: float
    top1_agreement: float  # share of tokens whose most likely prediction is the same
    tokens: int
    text: str
    by_depth: tuple[DepthBucket, ...]


class PerplexitySummary(Struct, frozen=True):
    """Perplexity per token; `ratio` is artifact / reference."""

    value: float
    reference: float | None
    ratio: float | None
    ratio_ci: tuple[float, float] | None
    tokens: int
    text: str


class Blocks(Struct, frozen=True):
    """Sums over runs of consecutive tokens, the units that are resampled: what a later comparison needs to pair with this one.

    Blocks of two results pair where `text_hash` and `tokens` agree.
    """

    text_hash: str  # of the token ids and the window
    tokens: tuple[int, ...]
    nll: tuple[float, ...]  # nats, of the artifact
    reference_nll: tuple[float, ...] | None  # nats; None without a reference
    kl: tuple[float, ...] | None


class TextResult(Struct, frozen=True):
    """Results of the text pass: perplexity and KL divergence."""

    perplexity: PerplexitySummary
    kl: KlSummary | None
    blocks: Blocks


class Evaluation(Struct, frozen=True):
    """Results of one artifact."""

    artifact: Subject
    settings: Mapping[str, Any]
    tasks: Mapping[str, TaskResult]
    text: TextResult | None
    seconds: float


class Gate(Struct, frozen=True):
    """Gate: one limit, checked. `task` is None for limits on the text pass."""

    name: str  # "max-drop"
    limit: float | None  # None: the baseline decides
    value: float
    task: str | None
    passed: bool
    reason: str  # one line


class _KnownSettings(Struct, frozen=True):
    """What a page says of a report's settings; others may be there."""

    limit: int | None = None
    notes: tuple[str, ...] = ()


class Report(Struct, frozen=True, kw_only=True):
    """An artifact's results beside a reference's, and the gates. `from_json(to_json(report)) == report`."""

    schema: int = SCHEMA
    elmexport: str = __version__
    lm_eval: str | None  # None where no task was run
    artifact: Subject
    reference: Subject | None
    settings: Mapping[str, Any]
    tasks: Mapping[str, TaskResult]
    kl: KlSummary | None
    perplexity: PerplexitySummary | None
    blocks: Blocks | None
    gates: tuple[Gate, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> str:
        """The document, on one line.

        Raises:
            ElmExportError: a figure that is not finite.
        """
        document = to_builtins(self) | {"tasks": {name: task.to_document() for name, task in self.tasks.items()}}
        try:
            return json.dumps(document, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise ElmExportError(f"the results of {self.artifact.label} hold figures that are not finite; the artifact is broken") from None

    @classmethod
    def from_json(cls, text: str, name: str) -> Report:
        """Read what `to_json` wrote; `name` is what errors call it, the file's path. Keys that are not known are ignored.

        Raises:
            ElmExportError: not JSON, a newer schema, missing keys, or values of other types.
        """
        document = parse_json(text, name, FIX)
        if isinstance(document, dict):
            if "schema" not in document or "artifact" not in document:
                raise ElmExportError(f"{name} is JSON, but no report (it lacks schema or artifact); {FIX}")
            schema = document["schema"]
            if isinstance(schema, int) and schema > SCHEMA:
                raise ElmExportError(f"{name}: report schema {schema}, this version reads up to {SCHEMA}; update elmexport")
            tasks = document.get("tasks")
            if isinstance(tasks, dict):
                read = {task: TaskResult.from_document(entry, name, f"report.tasks.{task}") for task, entry in tasks.items()}
                document = document | {"tasks": read}
            to_struct(document.get("settings", {}), _KnownSettings, name, _AGAIN, root="report.settings")
        return to_struct(document, cls, name, _AGAIN, root="report")


def read_report(path: Path) -> Report:
    """Read a report from its file.

    Raises:
        ElmExportError: no such file, or see `Report.from_json`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}; give a file that elmexport eval wrote") from None
    except UnicodeDecodeError:
        raise ElmExportError(f"{path} is not UTF-8 text; give a file that elmexport eval wrote") from None
    return Report.from_json(text, str(path))


def write_report(report: Report, path: Path) -> None:
    """Write the document, whole or not at all.

    Raises:
        ElmExportError: the place cannot be written.
    """
    write_text(path, report.to_json() + "\n")
