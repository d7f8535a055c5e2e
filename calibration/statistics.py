"""Statistics of activations on a calibration text: second moments of every linear layer's input, and peaks.

One safetensors file holds it all. Statistics of activations are stored once, under the name that the traced graph gives the activation
(`layers.3.attn_norm`), however many weights read it; `calibration.collect` measures them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.checkpoint.base import Checkpoint
from elmexport.documents import parse_json, to_struct
from elmexport.errors import ElmExportError, listed
from elmexport.files import MappedTensors, read_metadata, write_safetensors
from elmexport.weights import Role, WeightSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = 1  # of the file; a reader refuses a newer one
METADATA_KEY = "elmexport.statistics"
TOKEN_COUNTS = "token_counts"
MEAN_SQUARE, MEAN_ABS, HESSIAN = "mean_square", "mean_abs", "hessian"
ROUTED = "routed"
_FIX = "calibrate again"


@dataclass(frozen=True)
class Moments:
    """Moments of the input x `[in]` of a linear layer, over `tokens` positions, in the float32 model as published (alpha 1, not folded).

    Of an expert, over the positions that went to it; where none did, they are zero.
    """

    tokens: int
    mean_square: Tensor  # float32 [in]: E[x²]
    mean_abs: Tensor | None  # float32 [in]: E[|x|]; None in an importance matrix and in a short pass
    hessian: Tensor | None  # float32 [in, in]: E[x xᵀ], symmetric, its diagonal equal to `mean_square`; None where not asked for

    def to(self, device: torch.device) -> Moments:
        """Move the moments to `device`."""
        mean_abs, hessian = (None if tensor is None else tensor.to(device) for tensor in (self.mean_abs, self.hessian))
        return Moments(self.tokens, self.mean_square.to(device), mean_abs, hessian)


def mean_square_of(moments_of: Callable[[WeightSpec], Moments | None]) -> Callable[[WeightSpec], Tensor | None]:
    """Take the mean squares, float32 `[in]`, out of the moments of what a matrix multiplies, for `CheckpointWeights`."""

    def get(spec: WeightSpec) -> Tensor | None:
        moments = moments_of(spec)
        return None if moments is None else moments.mean_square

    return get


@dataclass(frozen=True)
class Facts:
    """Metadata of a statistics file: what was read by which model, and the small figures."""

    model: str  # display name
    identity: str  # SHA-256 of `Checkpoint.identity`; empty for an importance matrix, which does not say
    text: str  # what was read, in words
    text_sha256: str  # of the token ids; empty for an importance matrix
    tokens: int  # positions, BOS of each window included
    window: int  # tokens of one window
    hessian: bool
    inputs: Mapping[str, str]  # name of each weight to that of the activation it reads
    residual_peaks: tuple[
        float, ...
    ]  # largest magnitude on the residual stream after the embedding, then in each layer; one of all in a short pass
    norm_peaks: Mapping[str, float]  # by the name of each norm's weight: the largest sum of squares it met (q/k norms: in one head)


class Statistics:
    """Statistics of a model's activations; the tensors of a file are mapped, and read where one is looked at.

    Of what an expert reads there is `A.routed` too, int64 `[1]`: the positions that went to it.

    Tensors: for every activation `A` `A.mean_square`, `A.mean_abs` (float32 `[in]`) and, if asked for, `A.hessian` (float32
    `[in, in]`); and `token_counts`, int64 `[vocab]`.
    """

    def __init__(self, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
        self.facts = facts
        self.tensors = tensors

    @property
    def residual_peak(self) -> float | None:
        """The largest magnitude that was met on the residual stream; None only for an importance matrix. See `choose_alpha`."""
        return max(self.facts.residual_peaks, default=None)

    @property
    def token_counts(self) -> Tensor | None:
        """Counts of the tokens read, int64 `[vocab]`; None in an importance matrix and in a short pass."""
        return self.tensors.get(TOKEN_COUNTS)

    def moments(self, spec: WeightSpec) -> Moments | None:
        """Look up the moments of what `spec` multiplies; None for a tensor that multiplies nothing (a norm, an untied embedding).

        None too for an expert that a short pass sends no token to.
        """
        activation = self.facts.inputs.get(spec.name)
        if activation is None:
            return None
        routed = self.tensors.get(f"{activation}.{ROUTED}")
        return Moments(
            self.facts.tokens if routed is None else int(routed),
            self.tensors[f"{activation}.{MEAN_SQUARE}"],
            self.tensors.get(f"{activation}.{MEAN_ABS}"),
            self.tensors.get(f"{activation}.{HESSIAN}"),
        )

    def routed(self, specs: Iterable[WeightSpec]) -> dict[int, list[int]]:
        """Count, by layer, the positions that went to each expert of the model with `specs`; empty where it has none, or none were counted."""
        found: dict[int, list[int]] = {}
        for spec in specs:
            counts = self.tensors.get(f"{self.facts.inputs.get(spec.name)}.{ROUTED}")
            if spec.role is Role.MOE_EXPERTS_GATE and spec.layer is not None and counts is not None:
                found.setdefault(spec.layer, []).append(int(counts))
        return found

    def outliers(self) -> list[tuple[str, float]]:
        """Rank weights by how many times their inputs' root mean square the largest channel's is, the most extreme first.

        Quantization that does not know the inputs suffers where this is large.
        """
        ratios = []
        for name, activation in self.facts.inputs.items():
            square = self.tensors[f"{activation}.{MEAN_SQUARE}"]
            mean = float(square.mean())
            ratios.append((name, math.sqrt(float(square.max()) / mean) if mean else 1.0))
        return sorted(ratios, key=lambda pair: -pair[1])

    def save(self, path: Path) -> None:
        """Write one safetensors file, tensor by tensor.

        Raises:
            OSError: it cannot be written; what was written remains.
        """
        write_safetensors(path, self.tensors, {METADATA_KEY: json.dumps({"format": FORMAT, **asdict(self.facts)})})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read the metadata of `path`; tensors follow when they are asked for.

        Raises:
            ElmExportError: no such file, another kind of file, a damaged one, or one of a newer format.
        """
        header = read_metadata(path, "statistics file", "make one with `elmexport calibrate --out FILE`")
        if METADATA_KEY not in header:
            raise ElmExportError(f"{path} holds no calibration statistics; make them with `elmexport calibrate --out FILE`")
        facts = _facts(path, header[METADATA_KEY])
        tensors = MappedTensors(path, _FIX)
        kinds = (MEAN_SQUARE, MEAN_ABS, *([HESSIAN] if facts.hessian else []))
        wanted = {TOKEN_COUNTS, *(f"{activation}.{kind}" for activation in facts.inputs.values() for kind in kinds)}
        missing = sorted(wanted - set(tensors))
        if missing:
            raise ElmExportError(f"{path} is damaged: it lacks {listed(missing)}; {_FIX}")
        return cls(facts, tensors)


def load_statistics(path: Path, checkpoint: Checkpoint) -> Statistics:
    """Read the statistics in `path`, made sure to be of `checkpoint`.

    Raises:
        ElmExportError: statistics of another model, or see `Statistics.load`.
    """
    statistics = Statistics.load(path)
    found, wanted = statistics.facts.identity, checkpoint.identity()
    if found != wanted:
        raise ElmExportError(
            f"{path} holds the statistics of another model: {statistics.facts.model}, identity {found[:12]}…, "
            f"while {checkpoint.source.name} has {wanted[:12]}…; calibrate this one with `elmexport calibrate`"
        )
    _check_tensors(statistics, checkpoint)
    return statistics


def _check_tensors(statistics: Statistics, checkpoint: Checkpoint) -> None:
    """Compare the tensors that `Statistics.load` found with the inputs of the matrices of `checkpoint`.

    Raises:
        ElmExportError: a matrix that the model does not have, or a tensor of another type or shape.
    """
    import torch

    facts, tensors = statistics.facts, statistics.tensors
    assert isinstance(tensors, MappedTensors)
    strange = [name for name in (*facts.inputs, *facts.norm_peaks) if name not in checkpoint.specs]
    if strange:
        raise ElmExportError(f"the statistics are damaged: they list {listed(strange)}, which the model does not have; {_FIX}")
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, activation in facts.inputs.items():
        size = checkpoint.specs[name].shape[-1]
        layout |= {f"{activation}.{kind}": (torch.float32, (size,)) for kind in (MEAN_SQUARE, MEAN_ABS)}
        if facts.hessian:
            layout[f"{activation}.{HESSIAN}"] = (torch.float32, (size, size))
        if f"{activation}.{ROUTED}" in tensors:
            layout[f"{activation}.{ROUTED}"] = (torch.int64, (1,))
    tensors.check(layout)


def _facts(path: Path, text: str) -> Facts:
    name = f"{path}: its metadata"
    data = parse_json(text, name, _FIX)
    version = data.get("format") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ElmExportError(f"{path}: statistics of format {version}, this version reads up to {FORMAT}; update elmexport")
    facts = to_struct(data, Facts, name, _FIX)
    figures = [*facts.residual_peaks, *facts.norm_peaks.values()]
    if not all(math.isfinite(figure) and figure >= 0 for figure in figures) or facts.tokens < 1:
        raise ElmExportError(f"{path} is damaged: a peak or a count in its metadata is no such figure; {_FIX}")
    return facts
