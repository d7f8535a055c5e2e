"""Stored checkpoints, whatever the file format: names, padding rows, buffers, tied heads stored twice, dtype checks, identity."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.checkpoint.mismatch import Mismatch
from elmexport.checkpoint.names import find_names
from elmexport.checkpoint.tensor_files import FLOATS, WHOLE_NUMBERS, TensorFiles
from elmexport.errors import ElmExportError, listed
from elmexport.models import find_family
from elmexport.models.base import ModelConfig
from elmexport.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import torch

# Training code pads the vocabulary to whole tiles of a matrix unit; CoreNet's has 32,128 rows for 32,000 tokens.
PAD_MULTIPLE, MOST_PADDING = 64, 128
# Tables that a model computes from its configuration and some versions of its code store all the same.
_BUFFERS = re.compile(r"(^|\.)(inv_freq|cos_cached|sin_cached|cached_cos|cached_sin|causal_mask|masked_bias)$")


class StoredCheckpoint(Checkpoint):
    """Tensors in files, under the names of the family's published checkpoints."""

    def __init__(self, files: TensorFiles, config: ModelConfig, source: Source, tokenizer_path: Path | None = None) -> None:
        """Match the tensors of `files` with those that `config` calls for; whether all are there, `check` says.

        Raises:
            ElmExportError: a weight that is stored twice, or in a dtype that is not a float of 16 or 32 bits.
        """
        super().__init__(config, source, tokenizer_path)
        self._files = files
        self._identity: str | None = None
        found = find_names(files.facts, {*self.specs, config.head_name}, find_family(config.model_type).trained_name)
        if found.doubled:
            pairs = [f"{first} and {second}" for first, second in found.doubled]
            raise ElmExportError(
                f"{files.path} holds tensors twice: {listed(pairs, longest=160)}; save the model's own state dictionary by itself"
            )
        self._stored = found.stored
        self._shapes = {name: files.facts[stored].shape for name, stored in found.stored.items()}
        self._unknown = self._without_buffers(found.unknown)
        self._check_dtypes()
        if found.prefixes:
            self.notes.append(f"tensor names begin with {' or '.join(map(repr, found.prefixes))} ({files.path.name}), which was left out")
        self._crop()

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def stored_name(self, name: str) -> str:
        return self._stored.get(name, name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._files.read(self._stored[name])
        return tensor if tuple(tensor.shape) == self._shapes[name] else tensor[: self._shapes[name][0]]

    def check(self) -> None:
        """As `Checkpoint.check`; a tied model that stores its head all the same passes if the head is the embedding up to rounding."""
        head = self.config.head_name
        if self.config.dims.tied and head in self._shapes:
            if self._shapes[head] == self._shapes.get(self.embedding_name):
                self._drop_equal_head(head)
            else:
                self._unknown = (*self._unknown, self._stored[head])
        super().check()

    def mismatch(self) -> Mismatch:
        return Mismatch(self.config, self.specs, self._shapes, self._unknown, self._stored)

    def identity(self, progress: Progress | None = None) -> str:
        """SHA-256 over the configuration and every tensor's name, dtype, shape and bytes, in the model's order.

        So it does not depend on the file format, on how tensors are called or spread over files, or on their order there. Computed once: it
        reads everything.
        """
        if self._identity is None:
            self._identity = self._hash(progress or SilentProgress())
        return self._identity

    def _hash(self, progress: Progress) -> str:
        import torch

        progress.stage("hashing the model", sum(spec.size for spec in self.specs.values()))
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name in self.specs:
            tensor = self.read(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
            progress.advance(self.specs[name].size)
        return digest.hexdigest()

    def _without_buffers(self, unknown: tuple[str, ...]) -> tuple[str, ...]:
        """`unknown` without tables and counters that are no weights, of which a note tells."""
        facts = self._files.facts
        rest = [name for name in unknown if facts[name].dtype not in WHOLE_NUMBERS and not _BUFFERS.search(name)]
        buffers = [f"{name} ({facts[name].dtype})" for name in unknown if name not in rest]
        if buffers and not Mismatch(self.config, self.specs, self._shapes, unknown, {}).quantized:
            self.notes.append(f"{len(buffers)} stored buffers are no weights and were left out: {listed(buffers)}")
            return tuple(rest)
        return unknown

    def _check_dtypes(self) -> None:
        facts = self._files.facts
        odd = [f"{stored} is {facts[stored].dtype}" for stored in self._stored.values() if facts[stored].dtype not in FLOATS]
        if odd:
            raise ElmExportError(
                f"the weights of {self.source.name} are stored as something else than {', '.join(FLOATS)}: {listed(odd)}. "
                "Save the checkpoint in one of these types (quantized checkpoints cannot be exported; use the original)"
            )

    def _crop(self) -> None:
        """Leave out the rows by which training code padded the vocabulary."""
        cropped = []
        for name in (self.embedding_name, self.config.head_name):
            rows, wanted = (self._shapes.get(name) or (0,))[0], self.config.dims.vocab_size
            if is_padded(rows, wanted):
                self._shapes[name] = (wanted, *self._shapes[name][1:])
                cropped.append((self._stored[name], rows, rows - wanted))
        if cropped:
            name, rows, padding = cropped[0]
            self.notes.append(
                f"{name} has {rows:,} rows for {self.config.dims.vocab_size:,} tokens: the last {padding} were taken for padding and left out "
                f"(if they are tokens, set vocab_size to {rows} in config.json)"
            )

    def _drop_equal_head(self, head: str) -> None:
        # Some tools write a tied head out as a tensor of its own. Equal, it says nothing new; different, the file and its config.json
        # describe two models, and guessing which one was meant would be wrong half of the time.
        import torch

        stored, embedding = self.read(head), self.read(self.embedding_name)
        if not (stored.dtype == embedding.dtype and torch.equal(stored, embedding)):
            if not equal_but_for_rounding(stored, embedding):
                raise ElmExportError(
                    f"{self.source.name}: config.json says that the output layer shares the embedding ({self.config.tied_key} is true), but the "
                    f"weights hold a {self._stored[head]} that differs from {self._stored[self.embedding_name]}; set {self.config.tied_key} to false "
                    "if the stored head is the right one, else remove it from the weights"
                )
            self.notes.append(
                f"{self._stored[head]} ({_dtype(stored)}) is {self._stored[self.embedding_name]} ({_dtype(embedding)}) but for rounding; "
                "the model shares the two, and the embedding was taken"
            )
        del self._shapes[head]


def is_padded(rows: int, vocab_size: int) -> bool:
    """Whether a matrix of `rows` rows is one of `vocab_size` tokens and padding."""
    return 0 < rows - vocab_size <= MOST_PADDING and rows % PAD_MULTIPLE == 0


def equal_but_for_rounding(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether each of the two is the other after at most one rounding (or truncation) to bfloat16 or fp16."""
    import torch

    first, second = one.to(torch.float32), other.to(torch.float32)
    # bfloat16 has 8 significant bits; fp16's smallest step is 2^-24.
    allowed = torch.maximum(first.abs(), second.abs()).mul_(2.0**-8).add_(2.0**-24)
    return bool(((first - second).abs_() <= allowed).all())


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
