"""Low-rank adapters (LoRA, DoRA) merged into a checkpoint as it is read.

With `W` `[out, in]`, `A` `[r, in]`, `B` `[out, r]` and a scale s, LoRA is `W + s B A` (arXiv:2106.09685). DoRA (arXiv:2402.09353) gives each
row of that the length `m` `[out]`. An embedding's matrices lie the other way round: `W + s (B A)ᵀ`, `A` `[r, vocab]`, `B` `[dim, r]`, and
PEFT's DoRA scales its columns.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.checkpoint.adapter_config import MERGE_FIX, Scaling, read_scaling
from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.checkpoint.mismatch import Mismatch
from elmexport.checkpoint.names import find_name
from elmexport.checkpoint.stored import is_padded
from elmexport.checkpoint.tensor_files import TensorFacts, TensorFiles
from elmexport.errors import ElmExportError, listed
from elmexport.models import config_from_dict, find_family
from elmexport.models.base import ModelConfig
from elmexport.progress import Progress
from elmexport.weights import WeightSpec

if TYPE_CHECKING:
    import torch

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.(?P<adapter>.+))?")
_SAVED = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.)")


@dataclass(frozen=True)
class Update:
    """Update of one matrix: names of the factors among the adapter's tensors, and the scale of their product."""

    a: str
    b: str
    magnitude: str | None  # DoRA
    scale: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter of one model, by the family's tensor names: updates, and tensors that are given whole."""

    name: str
    files: TensorFiles
    updates: Mapping[str, Update]
    whole: Mapping[str, str]  # stored name by the family's
    base: str | None  # the model that it says it was trained on
    notes: tuple[str, ...]

    def words(self) -> str:
        """Kind, rank and number of the updates, as a phrase."""
        ranks = sorted({self.files.facts[update.a].shape[0] for update in self.updates.values()})
        kinds = " and ".join(sorted({"LoRA" if update.magnitude is None else "DoRA" for update in self.updates.values()}))
        parts = (
            [f"{kinds} of rank {', '.join(map(str, ranks))} on {_count(len(self.updates), 'matrix', 'matrices')}"] if self.updates else []
        )
        return " and ".join([*parts, *([_count(len(self.whole), "whole tensor", "whole tensors")] if self.whole else [])])


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def is_adapter_tensor(name: str) -> bool:
    """Whether `name` is that of a factor or magnitude."""
    return _PART.fullmatch(name) is not None


def read_adapter(name: str, files: TensorFiles, folder: Path, config: ModelConfig) -> Adapter:
    """Read the adapter in `files` for the model `config`; its scale is told by a file in `folder`.

    Raises:
        ElmExportError: tensors that the model does not have or that have other sizes, incomplete updates, several adapters in one file, or a kind
            that is not merged.
    """
    scaling = read_scaling(folder)
    specs = {spec.name: spec for spec in config.weights()}
    wanted, trained_name = {*specs, config.head_name}, find_family(config.model_type).trained_name
    parts: dict[tuple[str, str], dict[str, str]] = {}
    adapters: set[str] = set()
    whole: dict[str, str] = {}
    unknown = []
    for stored in files.facts:
        match = _PART.fullmatch(stored.removesuffix(".weight"))
        target = f"{match['module']}.weight" if match else _SAVED.sub("", stored)
        found = find_name(target, wanted, trained_name)
        if found is None:
            unknown.append(stored)
        elif match is None:
            whole[found[0]] = stored
        else:
            adapters.add(match["adapter"] or "")
            parts.setdefault((found[0], match["module"].removeprefix(found[1])), {})[match["part"]] = stored
    if len(adapters) > 1:
        raise ElmExportError(
            f"{files.path} holds {len(adapters)} adapters ({listed(sorted(adapters))}); save the one that is to be merged by itself"
        )
    if unknown:
        raise ElmExportError(
            f"the adapter {files.path} changes what the model does not have: {listed(unknown)}. Give --model the base that it was trained on"
            + (f", {scaling.base}" if scaling.base else f", or {MERGE_FIX}")
        )
    updates = {spec: _update(files, spec, module, found, scaling) for (spec, module), found in parts.items()}
    notes = () if scaling.note is None else (scaling.note,)
    adapter = Adapter(name, files, updates, whole, scaling.base, notes)
    _check_sizes(adapter, specs, config)
    return adapter


def _update(files: TensorFiles, spec: str, module: str, found: Mapping[str, str], scaling: Scaling) -> Update:
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    a, b = (f"lora_embedding_{x}" if embedding else f"lora_{x}" for x in "AB")
    missing = [part for part in (a, b) if part not in found]
    if scaling.dora and "lora_magnitude_vector" not in found:
        missing.append("lora_magnitude_vector")
    if missing:
        raise ElmExportError(f"the adapter {files.path} lacks {', '.join(missing)} of {module}; save it again")
    rank = (files.facts[found[a]].shape or (0,))[0]
    return Update(found[a], found[b], found.get("lora_magnitude_vector"), scaling.scale(module, rank), embedding)


def _check_sizes(adapter: Adapter, specs: Mapping[str, WeightSpec], config: ModelConfig) -> None:
    facts, wrong = adapter.files.facts, []
    for name, update in adapter.updates.items():
        a, b = facts[update.a].shape, facts[update.b].shape
        product = (b[0], a[-1]) if len(a) == len(b) == 2 and a[0] == b[1] else None
        shape = specs[name].shape if name in specs else (config.dims.vocab_size, config.dims.model_dim)
        if product is not None and update.embedding:
            product = product[::-1]
        padded = (
            product is not None and update.magnitude is None and product[1:] == shape[1:] and is_padded(product[0], config.dims.vocab_size)
        )
        if product != shape and not (padded and shape[0] == config.dims.vocab_size):
            wrong.append(f"{update.b} {list(b)} times {update.a} {list(a)} is no {list(shape)}")
        length = shape[1 if update.embedding else 0]
        if update.magnitude is not None and facts[update.magnitude].shape != (length,):
            wrong.append(f"{update.magnitude} is {list(facts[update.magnitude].shape)}, not [{length}]")
    for name, stored in adapter.whole.items():
        shape = specs[name].shape if name in specs else (config.dims.vocab_size, config.dims.model_dim)
        if facts[stored].shape != shape:
            wrong.append(f"{stored} is {list(facts[stored].shape)}, the model's {list(shape)}")
    if wrong:
        raise ElmExportError(
            f"the adapter {adapter.files.path} has other sizes than the model: {'; '.join(text[:220] for text in wrong[:1])}"
            + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + f". Give --model the base that it was trained on{f', {adapter.base}' if adapter.base else ''}"
        )


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint with an adapter merged into its tensors, in float32.

    An adapter of a tied model's embedding changes what goes in, not what comes out, in training as in PEFT's and CoreNet's inference: the model
    is then no longer tied, and the untouched table is its head.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, source: Source) -> None:
        self._base, self._adapter = base, adapter
        head, embedding, tied = base.config.head_name, base.embedding_name, base.config.dims.tied
        unties = tied and (embedding in adapter.updates or head in adapter.updates or self._differs(head, embedding))
        config = config_from_dict({**base.config.to_dict(), base.config.tied_key: False}) if unties else base.config
        super().__init__(config, source, base.tokenizer_path)
        self.folder = base.folder
        self._shared_head = (head, embedding) if unties else None
        self.notes += [*base.notes, f"merged with the adapter {adapter.name}: {adapter.words()}", *adapter.notes]
        if unties:
            self.notes.append(
                f"the adapter changes {embedding} but not the output layer that shares it (or the other way round), so the two are exported as "
                "two tables, one more than the base has"
            )
        if adapter.base is not None and adapter.base.rstrip("/").rpartition("/")[2].casefold() != base.source.name.casefold():
            self.notes.append(f"the adapter says that it was trained on {adapter.base[:100]}; it was merged into {base.source.name}")

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._base.stored_shapes()
        if self._shared_head is not None:
            shapes[self._shared_head[0]] = self.specs[self._shared_head[0]].shape
        return shapes

    def stored_name(self, name: str) -> str:
        own = self._base.stored_name(name)
        return (
            f"{own}, merged with the adapter {self._adapter.name}," if name in self._adapter.updates or name in self._adapter.whole else own
        )

    def mismatch(self) -> Mismatch:
        return self._base.mismatch()

    def read(self, name: str) -> torch.Tensor:
        import torch

        adapter, update = self._adapter, self._adapter.updates.get(name)
        if name in adapter.whole:
            weight = adapter.files.read(adapter.whole[name])
        elif self._shared_head is not None and name == self._shared_head[0]:
            weight = self._base.read(self._shared_head[1])
        else:
            weight = self._base.read(name)
        if update is None:
            return weight
        a, b = (adapter.files.read(part).to(torch.float32) for part in (update.a, update.b))
        product = (a.T @ b.T)[: len(weight)] if update.embedding else (b @ a)[: len(weight)]
        merged = weight.to(torch.float32) + update.scale * product
        if update.magnitude is None:
            return merged
        axis = 0 if update.embedding else 1
        norm = torch.linalg.vector_norm(merged, dim=axis, keepdim=True)
        return merged * (adapter.files.read(update.magnitude).to(torch.float32).reshape(norm.shape) / norm)

    def identity(self, progress: Progress | None = None) -> str:
        """SHA-256 over the base's identity and the adapter's numbers: not over the products, whose last bits are the processor's."""
        self._base.identity(progress)
        return self._identity

    @cached_property
    def _identity(self) -> str:
        import torch

        digest = hashlib.sha256(f"adapted {self._base.identity()}\n".encode())
        updates, whole = self._adapter.updates, self._adapter.whole
        named = [(f"{name} {update.scale!r}", (update.a, update.b, update.magnitude)) for name, update in sorted(updates.items())]
        for words, parts in [*named, *((name, (stored,)) for name, stored in sorted(whole.items()))]:
            digest.update(f"{words}\n".encode())
            for part in filter(None, parts):
                tensor = self._adapter.files.read(part).contiguous()
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _differs(self, head: str, embedding: str) -> bool:
        """Whether the adapter brings a whole head that is not the embedding which the model will have."""
        import torch

        adapter = self._adapter
        if head not in adapter.whole:
            return False
        table = adapter.files.read(adapter.whole[embedding]) if embedding in adapter.whole else self._base.read(embedding)
        return not torch.equal(adapter.files.read(adapter.whole[head]).to(torch.float32), table.to(torch.float32))


class RenamedFiles(TensorFiles):
    """Some of the tensors of other files, under other names."""

    def __init__(self, files: TensorFiles, names: Mapping[str, str]) -> None:
        """`names`: the names in `files` by the new ones."""
        self.path, self._all, self._names = files.path, files, names
        self.facts: Mapping[str, TensorFacts] = {name: files.facts[stored] for name, stored in names.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._all.read(self._names[name])


def split(files: TensorFiles) -> tuple[TensorFiles, TensorFiles | None]:
    """The model's own tensors in `files`, and those of an adapter that training code stored with it (None where there is none)."""
    if not any(map(is_adapter_tensor, files.facts)):
        return files, None
    own = {name.replace(".base_layer.", "."): name for name in files.facts if not is_adapter_tensor(name)}
    return RenamedFiles(files, own), RenamedFiles(files, {name: name for name in files.facts if is_adapter_tensor(name)})
