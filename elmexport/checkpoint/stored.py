"""Stored checkpoints, whatever the file format: dtype checks, tied heads stored twice, identity.

The formats are `safetensors.py` and `corenet.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.weights import Role

DTYPES = ("BF16", "F16", "F32")  # safetensors' names


class StoredCheckpoint(Checkpoint):
    """Tensors in files. A subclass lists them in `__init__` and reads one in `read`."""

    def __init__(
        self,
        config: ModelConfig,
        source: Source,
        tokenizer_path: Path | None,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str],
    ) -> None:
        """`shapes` and `dtypes` (safetensors' names) of every stored tensor, under the names of `config.weights()`.

        Raises:
            ElmExportError: a dtype that is not a float of 16 or 32 bits.
        """
        super().__init__(config, source, tokenizer_path)
        self._shapes = dict(shapes)
        odd = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]
        if odd:
            raise ElmExportError(
                f"the weights of {source.name} are stored as something else than {', '.join(DTYPES)}: {_some(odd)}. "
                "Save the checkpoint in one of these types (quantized checkpoints cannot be exported; use the original)"
            )

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def check(self) -> None:
        """As `Checkpoint.check`; a tied model that stores its head all the same passes if the head equals the embedding."""
        head = self.config.head_name
        if self.config.dims.tied and head in self._shapes and self._shapes[head] == self._shapes.get(self._embedding):
            self._drop_equal_head(head)
        super().check()

    def identity(self) -> str:
        """SHA-256 over the configuration and every tensor's name, dtype, shape and bytes, in the model's order.

        So it does not depend on the file format, on how tensors are spread over files, or on their order there. Computed once: it reads
        everything.
        """
        return self._identity

    @cached_property
    def _identity(self) -> str:
        import torch

        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name in self.specs:
            tensor = self.read(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def _embedding(self) -> str:
        return next(name for name, spec in self.specs.items() if spec.role is Role.EMBEDDING)

    def _drop_equal_head(self, head: str) -> None:
        # Some tools write a tied head out as a tensor of its own. Equal, it says nothing new; different, the file and its config.json
        # describe two models, and guessing which one was meant would be wrong half of the time.
        import torch

        if not torch.equal(self.read(head), self.read(self._embedding)):
            raise ElmExportError(
                f"{self.source.name}: config.json says that the output layer shares the embedding ({self.config.tied_key} is true), but the weights "
                f"hold an {head} that differs from {self._embedding}; set {self.config.tied_key} to false if the stored head is the right one, "
                "else remove it from the weights"
            )
        del self._shapes[head]


def _some(problems: list[str], count: int = 5) -> str:
    return ", ".join(problems[:count]) + (f" and {len(problems) - count} more" if len(problems) > count else "")
