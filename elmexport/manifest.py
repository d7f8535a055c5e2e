"""Manifest of an artifact, `manifest.json`, as one typed document.

Reading is strict: a key that is missing, unknown or of another type is an error, so nobody who holds a `Manifest` has to doubt it. Open to
any content are only the model's `config`, which its family checks, and the names in `settings` and `tools`.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from elmexport.documents import parse_json, to_struct
from elmexport.errors import ElmExportError

FORMAT = 1  # of the document; a reader refuses a newer one
FIX = "export it again"

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
FloatType = Literal["fp32", "fp16", "bf16"]


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """Section of the document; its fields are written in their order."""


class Model(Section, frozen=True):
    """The model that was exported."""

    name: str  # display name
    source: str  # `Source.origin`
    revision: str | None  # the hub commit
    identity: str  # `Checkpoint.identity`
    parameters: Positive
    config: dict[str, Any]  # of its family


class FileSetting(Section, frozen=True):
    """A target's setting that is a file: its name, and the hash of its content."""

    file: str
    sha256: Sha256


Setting = str | bool | int | float | FileSetting | None


class RuleFacts(Section, frozen=True, omit_defaults=True):
    """One rule of a recipe; None: it does not ask."""

    scheme: str
    roles: tuple[str, ...] | None = None
    layers: str | None = None
    min_gqa: int | None = None
    experts: int | None = None


class CalibrationText(Section, frozen=True):
    """The text that codes were calibrated on."""

    text: str  # in words
    text_sha256: str  # of its token ids
    tokens: Count
    sequential: bool  # whether each matrix was fitted to its quantized predecessors


class Trial(Section, frozen=True):
    """A size that a search for a loss of accuracy tried."""

    bits_per_weight: float
    drop: float  # percentage points


class AllocationFacts(Section, frozen=True, kw_only=True):
    """Allocation of schemes matrix by matrix: for a size (`asked`), or the smallest within a loss of accuracy (`max_drop` to `trials`).

    Losses are in percentage points, divergences in nats per token, both of the weights only.
    """

    asked: float | UnsetType = UNSET  # bits per weight
    max_drop: float | UnsetType = UNSET
    task: str | UnsetType = UNSET
    searched_items: Count | UnsetType = UNSET  # that chose; `trials` are of these
    items: Count | UnsetType = UNSET  # others, which `drop` to `detectable_drop` are of
    drop: float | UnsetType = UNSET
    drop_interval: tuple[float, float] | UnsetType | None = UNSET  # 95 %
    detectable_drop: float | UnsetType | None = UNSET
    trials: tuple[Trial, ...] | UnsetType = UNSET
    predicted_kl: float
    predicted_on: str | UnsetType = UNSET  # the text that chose
    measured_kl: float
    text: str  # another, that `measured_kl` is of


class HeldOut(Section, frozen=True, kw_only=True, omit_defaults=True):
    """Loss of the weights on a text that no codes were fitted to."""

    text: str
    tokens: Count
    kl: float  # nats per token, weights only
    mse_kl: float  # what codes by `mse` would lose


class Quantization(Section, frozen=True, omit_defaults=True):
    """Quantization: the recipe, and the method that found the codes."""

    name: str
    words: str
    activations: FloatType
    norms: FloatType
    scales: FloatType
    fallback: FloatType
    max_self_check_kl: float
    rule: tuple[RuleFacts, ...]
    method: str
    calibration: CalibrationText | None  # None: it read nothing
    scarce_experts: dict[str, Count] | None = None  # matrices that too few tokens reached for the method, and how many did
    held_out: HeldOut | None = None  # of calibrated codes
    allocation: AllocationFacts | None = None


class Fallback(Section, frozen=True):
    """A tensor that could not take its scheme."""

    tensor: str
    reason: str


class Calibration(Section, frozen=True, omit_defaults=True):
    """Calibration of the factor on the residual stream."""

    method: Literal["measured", "default"]
    text: str | None
    tokens: Count
    residual_peak: float | None = None  # None: not measured


class StepUp(Section, frozen=True):
    """The next wider quantization of the format, and what its weights would lose on the text of the self-check."""

    quant: str
    bits_per_weight: float
    kl_mean: float  # nats per token, weights only


class SelfCheck(Section, frozen=True, omit_defaults=True):
    """The comparison with the model that ended the export (`text` to `top1_agreement`), or the `reason` why there was none."""

    done: bool
    text: str | None = None
    tokens: Count | None = None
    kl_mean: float | None = None  # nats per token
    kl_max: float | None = None
    top1_agreement: float | None = None  # a share
    reason: str | None = None
    step_up: StepUp | None = None  # where there is a wider one

    def __post_init__(self) -> None:
        figures = [figure is not None for figure in (self.text, self.tokens, self.kl_mean, self.kl_max, self.top1_agreement)]
        if not (all(figures) if self.done else not any(figures)) or self.done is (self.reason is not None):
            raise ValueError("one that was done has text, tokens, kl_mean, kl_max and top1_agreement, any other has a reason")


class ChainedPackage(Section, frozen=True):
    """One package of a model that was cut."""

    file: str
    layers: tuple[Count, Count]  # the first and the last
    weight_bytes: Count
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: tuple[str, ...]


class Joint(Section, frozen=True):
    """Connection of two packages: an output, and the input of the next package that takes it: each a package and a name."""

    source: tuple[str, str] = msgspec.field(name="from")
    to: tuple[str, str]


class Chain(Section, frozen=True):
    """Chain of packages of one model that run one after another.

    All inputs but those of `joints` come from the caller, the same for all packages.
    """

    functions: dict[str, Positive]  # and the tokens that each takes
    packages: tuple[ChainedPackage, ...]
    joints: tuple[Joint, ...]


class FileFacts(Section, frozen=True):
    """One file of the artifact."""

    bytes: Count
    sha256: Sha256


class Manifest(Section, frozen=True, kw_only=True, omit_defaults=True):
    """Manifest of an artifact, the whole document."""

    format: int
    model: Model
    target: str
    settings: dict[str, Setting]  # of the target
    quant: Quantization
    fallbacks: tuple[Fallback, ...]
    bits_per_weight: Annotated[float, Meta(gt=0)]
    context: Positive  # tokens that the KV cache holds
    alpha: Annotated[float, Meta(gt=0)]  # on the residual stream
    calibration: Calibration | None  # None: the artifact computes in fp32
    tools: dict[str, str]  # versions
    self_check: SelfCheck
    chain: Chain | None = None
    files: dict[str, FileFacts]  # by path in the folder

    def __post_init__(self) -> None:
        for name in self.files:
            paths = (PurePosixPath(name), PureWindowsPath(name))
            if any(path.anchor or ".." in path.parts for path in paths) or "\0" in name:
                raise ValueError(f"{name!r} under files lies outside of the folder")

    def to_dict(self) -> dict[str, Any]:
        """The document as plain values."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return document

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


def read_manifest(text: bytes, name: str) -> Manifest:
    """Read what `Manifest.to_json` wrote; `name` is what errors call it, the file's path.

    Raises:
        ElmExportError: not JSON, of a newer format, or keys that are missing, unknown or of other types.
    """
    document = parse_json(text, name, FIX)
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ElmExportError(f"{name}: manifest format {version}, this version reads up to {FORMAT}; update elmexport")
    return to_struct(document, Manifest, name, FIX)
