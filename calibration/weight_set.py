"""Calibrated weight sets: the codes and scales of every quantized tensor of a model in one file, computed once, for every format.

A safetensors file. A tensor NAME is stored in the parts that the codec of its scheme names (`NAME.codes`, `NAME.scales`, …; see
`docs/artifacts.md`), a folded norm or router as `NAME`, float32. `damping` float32 `[tensors]`, in the order of the metadata's `schemes`, is the damping that
GPTQ had to raise a tensor's Hessian by, 0 where the usual one was enough. In a model with experts, `scarce` int64 `[tensors]` likewise is the
number of tokens that reached a matrix which GPTQ left to weighted least squares because they were too few, -1 for all others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from elmexport.checkpoint.base import Checkpoint
from elmexport.documents import parse_json, to_struct
from elmexport.errors import ElmExportError, listed
from elmexport.files import MappedTensors, SafetensorsWriter, complete_file, read_metadata
from elmexport.quantization.codec import Codec, Quantized, find_codec
from elmexport.quantization.recipes import Plan
from elmexport.quantization.schemes import CodedScheme, find_scheme
from elmexport.quantization.weight_source import WeightSource
from elmexport.weights import WeightSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = 1  # of the file; a reader refuses a newer one
METADATA_KEY = "elmexport.weights"
DAMPING, SCARCE = "damping", "scarce"
_LATER = (DAMPING, SCARCE)  # what files of earlier versions lack
_FIX = "make one with --save-weights"


@dataclass(frozen=True)
class WeightFacts:
    """Metadata of a weight set: of which model, how computed, from what."""

    model: str  # display name
    identity: str  # SHA-256 of `Checkpoint.identity`
    schemes: Mapping[str, str]  # by tensor, as recipe files call them; quantized tensors only
    folded: tuple[str, ...]  # norms, and routers, that folding or distillation changed, held by the file too
    method: str
    sequential: bool  # fitted to what the quantized layers before hand on; false: to the statistics of the model as published
    text: str  # what was read, in words
    text_sha256: str  # of the token ids
    tokens: int
    elmexport: str  # version that computed it
    distilled: Mapping[str, float] | None = None  # KL on held-out windows `before` and `after` distillation, and its `steps`


class WeightSet:
    """A weight set file: its metadata, and tensors that are read when they are asked for."""

    def __init__(self, path: Path, facts: WeightFacts) -> None:
        self.path, self.facts = path, facts
        self._tensors = MappedTensors(path, _FIX)

    @classmethod
    def load(cls, path: Path) -> WeightSet:
        """Open `path` and read its metadata.

        Raises:
            ElmExportError: no such file, another kind of file, a damaged one, or one of a newer format.
        """
        header = read_metadata(path, "weight set", _FIX)
        if METADATA_KEY not in header:
            raise ElmExportError(f"{path} holds no calibrated weights; {_FIX}")
        return cls(path, _facts(path, header[METADATA_KEY]))

    def check(self, checkpoint: Checkpoint, plan: Plan) -> None:
        """Check that these are weights of `checkpoint` in the schemes of `plan`.

        Raises:
            ElmExportError: another model, another scheme for some tensor, or a damaged file.
        """
        if self.facts.identity != checkpoint.identity():
            raise ElmExportError(
                f"{self.path} holds the weights of another model: {self.facts.model}, identity {self.facts.identity[:12]}…, while "
                f"{checkpoint.source.name} has {checkpoint.identity()[:12]}…; leave --weights-from out to compute this model's"
            )
        strange = [name for name in dict.fromkeys((*self.facts.schemes, *self.facts.folded)) if name not in checkpoint.specs]
        if strange:
            raise ElmExportError(f"{self.path} is damaged: it lists {listed(strange)}, which the model does not have; {_FIX}")
        wanted = quantized_schemes(plan)
        for name in sorted(wanted.keys() | self.facts.schemes.keys()):
            have, want = self.facts.schemes.get(name), wanted.get(name)
            if have != want:
                raise ElmExportError(
                    f"{self.path} holds {name} as {have or 'no quantized tensor'}, while --quant {plan.recipe.name} stores it as "
                    f"{want or plan.schemes[name]}; choose the --quant that the file was made with, or leave --weights-from out"
                )
        layout = _layout(self.facts, checkpoint.specs)
        self._tensors.check({name: part for name, part in layout.items() if name not in _LATER or name in self._tensors})

    def damped(self) -> dict[str, float]:
        """Tensors whose Hessian needed more damping than usual, and how much, as a part of its mean diagonal."""
        if DAMPING not in self._tensors:
            return {}  # written before this was recorded
        return {name: value for name, value in zip(self.facts.schemes, self._tensors[DAMPING].tolist(), strict=True) if value}

    def scarce(self) -> dict[str, int]:
        """Matrices of experts that too few tokens reached for GPTQ, and how many did."""
        if SCARCE not in self._tensors:
            return {}
        return {name: count for name, count in zip(self.facts.schemes, self._tensors[SCARCE].tolist(), strict=True) if count >= 0}

    def norms(self) -> dict[str, Tensor]:
        """The norms and routers that a folding changed, float32, by name."""
        return {name: self._tensors[name] for name in self.facts.folded}

    def get(self, spec: WeightSpec) -> Quantized:
        """Read the tensor of `spec`, which is one of `facts.schemes`.

        Raises:
            ElmExportError: scales or table entries that are not finite.
        """
        codec = _codec(self.facts.schemes[spec.name])
        parts = {part: self._tensors[f"{spec.name}.{part}"] for part in codec.layout(spec.shape)}
        for part, tensor in parts.items():
            if tensor.is_floating_point() and not all(map(math.isfinite, map(float, tensor.aminmax()))):
                raise ElmExportError(f"{self.path} is damaged: {spec.name}.{part} holds NaN or infinity; {_FIX}")
        return codec.from_parts(parts, spec.shape)


class StoredWeights(WeightSource):
    """Weights of a weight set, norms and routers that a folding changed included. Of `checkpoint`, only tensors that are not in the set are read."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, weights: WeightSet) -> None:
        """`weights` have passed `WeightSet.check` with `checkpoint` and `plan`."""
        super().__init__(checkpoint, plan)
        self.weight_set, self._norms = weights, weights.norms()

    def numbers(self, spec: WeightSpec) -> Tensor:
        return self._norms[spec.name] if spec.name in self._norms else super().numbers(spec)

    def _quantized(self, spec: WeightSpec, scheme: CodedScheme) -> Quantized:
        return self.weight_set.get(spec)


def quantized_schemes(plan: Plan) -> dict[str, str]:
    """Name of the scheme of every tensor that `plan` stores as codes of ours (not as a type of ggml's)."""
    return {name: scheme.recipe_name for name, scheme in plan.schemes.items() if isinstance(scheme, CodedScheme)}


class WeightWriter:
    """Writer of a weight set, tensor by tensor in any order; the sizes of all are known from their schemes."""

    def __init__(self, file: IO[bytes], facts: WeightFacts, specs: Mapping[str, WeightSpec]) -> None:
        layout = _layout(facts, specs)
        self._damping = dict.fromkeys(facts.schemes, 0.0)
        self._scarce = dict.fromkeys(facts.schemes, -1) if SCARCE in layout else None
        self._writer = SafetensorsWriter(file, layout, {METADATA_KEY: json.dumps({"format": FORMAT, **asdict(facts)})})

    def add(self, spec: WeightSpec, quantized: Quantized) -> None:
        for part, tensor in quantized.parts().items():
            self._writer.write(f"{spec.name}.{part}", tensor)

    def damped(self, spec: WeightSpec, damping: float) -> None:
        """Record that the Hessian of `spec` needed more damping than usual: this part of its mean diagonal."""
        self._damping[spec.name] = damping

    def scarce(self, spec: WeightSpec, tokens: int) -> None:
        """Record that only `tokens` tokens reached the matrix of `spec`, too few for GPTQ."""
        assert self._scarce is not None, f"{spec.name} is no expert's"
        self._scarce[spec.name] = tokens

    def add_norm(self, name: str, tensor: Tensor) -> None:
        """Write a norm, or a router, that folding or distillation changed."""
        self._writer.write(name, tensor)

    def close(self) -> None:
        import torch

        self._writer.write(DAMPING, torch.tensor(list(self._damping.values()), dtype=torch.float32))
        if self._scarce is not None:
            self._writer.write(SCARCE, torch.tensor(list(self._scarce.values())))
        self._writer.close()


@contextmanager
def weight_writer(path: Path, facts: WeightFacts, specs: Mapping[str, WeightSpec]) -> Iterator[WeightWriter]:
    """Open a writer into `path`, a file that appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as partial, partial.open("wb") as file:
        writer = WeightWriter(file, facts, specs)
        yield writer
        writer.close()


def _layout(facts: WeightFacts, specs: Mapping[str, WeightSpec]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor of the file, in the order in which it holds them."""
    import torch

    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, scheme in facts.schemes.items():
        layout |= {f"{name}.{label}": (part.dtype, part.shape) for label, part in _codec(scheme).layout(specs[name].shape).items()}
    layout |= {name: (torch.float32, specs[name].shape) for name in facts.folded}
    layout[DAMPING] = (torch.float32, (len(facts.schemes),))
    if any(specs[name].role.is_expert for name in facts.schemes):
        layout[SCARCE] = (torch.int64, (len(facts.schemes),))
    return layout


def _codec(scheme: str) -> Codec:
    found = find_scheme(scheme)
    assert isinstance(found, CodedScheme), scheme
    return find_codec(found)


def _facts(path: Path, text: str) -> WeightFacts:
    name = f"{path}: its metadata"
    data = parse_json(text, name, _FIX)
    version = data.get("format") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ElmExportError(f"{path}: weight set of format {version}, this version reads up to {FORMAT}; update elmexport")
    facts = to_struct(data, WeightFacts, name, _FIX)
    if facts.distilled is not None and not {"before", "after"} <= facts.distilled.keys():
        raise ElmExportError(f"{name} lacks the divergences before and after distillation; {_FIX}")
    for scheme in facts.schemes.values():
        if not scheme or not isinstance(find_scheme(scheme), CodedScheme):
            raise ElmExportError(f"{name} names the scheme {scheme!r}, which has no codes; {_FIX}")
    return facts
