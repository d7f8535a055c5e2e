"""What an evaluation found: one artifact's own results (`Evaluation`), and the document that compares them with a reference (`Report`).

The JSON layout is described by `report.schema.json` beside this file and in docs/evaluation.md. Shares are between 0 and 1, drops in
percentage points, divergences in nats per token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elmexport import __version__
from elmexport.errors import ElmExportError
from elmexport.evaluation.document import decode, decode_fields, encode, expect
from elmexport.files import write_text

SCHEMA = 1  # of the document; a reader refuses a newer one


@dataclass(frozen=True)
class ModelFacts:
    """The model that an artifact was made from; `identity` is `Checkpoint.identity`, None where the artifact does not say."""

    name: str
    identity: str | None


@dataclass(frozen=True)
class Subject:
    """What was evaluated."""

    label: str  # "OpenELM-tiny-onnx-int4"
    path: str
    target: str  # "onnx", or "checkpoint" for the model itself
    engine: str  # `Runtime.name`
    quant: str  # "int4", "fp16 reference"
    words: str  # the quantization in words
    bits_per_weight: float | None
    bytes: int | None  # on disk: all files; None for the reference, which is not stored in the precision it is computed in
    identity: str  # SHA-256 that changes with the files
    model: ModelFacts


@dataclass(frozen=True)
class ItemScores:
    """What one model made of one item: every metric, and the log-likelihood of each choice in nats."""

    metrics: Mapping[str, float]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Item:
    """One document of a task. Two artifacts' items pair where both `id` and `hash` agree."""

    id: int  # lm-eval's doc_id
    hash: str  # of the item's requests: the same hash, the same question
    metrics: Mapping[str, float]
    scores: tuple[float, ...]
    text: str
    choices: tuple[str, ...]
    target: int | None  # which choice is right
    reference: ItemScores | None = None


@dataclass(frozen=True)
class Flips:
    """Items whose answer was right in one model and wrong in the other."""

    right_to_wrong: int
    wrong_to_right: int


@dataclass(frozen=True)
class TaskComparison:
    """One task against the reference; the figures are of the task's `metric`. None: the metric has no such figure."""

    reference: Mapping[str, float]  # its metrics
    drop: float | None  # percentage points, positive where the artifact is worse
    drop_ci: tuple[float, float] | None  # 95 %
    ci_method: str
    flips: Flips | None  # of metrics that are 0 or 1 per item
    mcnemar_p: float | None
    detectable_drop: float | None  # the smallest true drop, in points, that so many items find with a probability of 80 %
    ratio: float | None  # artifact / reference, of metrics that are perplexities
    ratio_ci: tuple[float, float] | None


@dataclass(frozen=True)
class TaskResult:
    """One task. `metrics` holds every metric of the task by lm-eval's name, `metric` names the one that OpenELM's tables quote."""

    metrics: Mapping[str, float]
    n: int
    fewshot: int
    metric: str
    higher_is_better: bool  # of `metric`
    stderr: Mapping[str, float]
    items: tuple[Item, ...]
    published: float | None = None  # per cent, OpenELM's own figure for this model, few-shot setting and metric
    comparison: TaskComparison | None = None

    def to_document(self) -> dict[str, Any]:
        """Flat: metrics and comparison stand beside the other keys."""
        own = {key: encode(getattr(self, key)) for key in ("n", "fewshot", "metric", "higher_is_better", "stderr", "published")}
        against = dict.fromkeys(_COMPARISON_KEYS) if self.comparison is None else encode(self.comparison)
        return {**self.metrics, **own, **against, "items": encode(self.items)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any], where: str) -> TaskResult:
        names = [key for key in document if key not in _TASK_KEYS]
        metrics = decode(Mapping[str, float], {name: document[name] for name in names}, where)
        comparison = decode_fields(TaskComparison, document, where) if document.get("reference") is not None else None
        result = cls(**decode_fields(cls, {**document, "metrics": metrics, "comparison": None}, where))
        if result.metric not in metrics:
            raise ElmExportError(f"{where}.metric is {result.metric!r}, but the task's metrics are {', '.join(metrics) or 'none'}")
        return replace(result, comparison=None if comparison is None else TaskComparison(**comparison))


_COMPARISON_KEYS = tuple(TaskComparison.__dataclass_fields__)
_TASK_KEYS = {*TaskResult.__dataclass_fields__, *_COMPARISON_KEYS}


@dataclass(frozen=True)
class DepthBucket:
    """KL divergence at some depths in the window: tokens read before the prediction, `start` to `end` exclusive."""

    start: int = field(metadata={"key": "from"})
    end: int = field(metadata={"key": "to"})
    mean: float
    p99: float
    tokens: int


@dataclass(frozen=True)
class KlSummary:
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


@dataclass(frozen=True)
class PerplexitySummary:
    """Perplexity per token; `ratio` is artifact / reference."""

    value: float
    reference: float | None
    ratio: float | None
    ratio_ci: tuple[float, float] | None
    tokens: int
    text: str


@dataclass(frozen=True)
class Blocks:
    """Sums over runs of consecutive tokens, the units that are resampled: what a later comparison needs to pair with this one.

    Blocks of two results pair where `text_hash` and `tokens` agree.
    """

    text_hash: str  # of the token ids and the window
    tokens: tuple[int, ...]
    nll: tuple[float, ...]  # nats, of the artifact
    reference_nll: tuple[float, ...] | None  # nats; None without a reference
    kl: tuple[float, ...] | None


@dataclass(frozen=True)
class TextResult:
    """The pass over a text."""

    perplexity: PerplexitySummary
    kl: KlSummary | None
    blocks: Blocks


@dataclass(frozen=True)
class Evaluation:
    """One artifact's own results."""

    artifact: Subject
    settings: Mapping[str, Any]
    tasks: Mapping[str, TaskResult]
    text: TextResult | None
    seconds: float


@dataclass(frozen=True)
class Gate:
    """One limit, checked. `task` is None for limits on the text pass."""

    name: str  # "max-drop"
    limit: float | None  # None: the baseline decides
    value: float
    task: str | None
    passed: bool
    reason: str  # one line


@dataclass(frozen=True, kw_only=True)
class Report:
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
        try:
            return json.dumps(encode(self), ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise ElmExportError(f"the results of {self.artifact.label} hold figures that are not finite; the artifact is broken") from None

    @classmethod
    def from_json(cls, text: str, name: str) -> Report:
        """Read what `to_json` wrote; `name` is what errors call it, the file's path.

        Raises:
            ElmExportError: not JSON, a newer schema, missing keys, or values of other types.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ElmExportError(f"{name} is not JSON ({error}); give a file that elmexport eval wrote") from None
        expect(document, dict, name)
        if "schema" not in document or "artifact" not in document:
            raise ElmExportError(f"{name} is JSON, but no report (it lacks schema or artifact); give a file that elmexport eval wrote")
        schema = decode(int, document["schema"], f"{name}: schema")
        if schema > SCHEMA:
            raise ElmExportError(f"{name}: report schema {schema}, this version reads up to {SCHEMA}; update elmexport")
        report = cls(**decode_fields(cls, document, f"{name}: report"))
        assert isinstance(report, Report)
        return report


def read_report(path: Path) -> Report:
    """
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
