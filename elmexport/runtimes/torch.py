"""The reference runtime: a checkpoint in torch, eager ops, float32 (or float64), weights resident."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Checkpoint
from elmexport.graph.interpret import Caches, interpret
from elmexport.graph.trace import trace
from elmexport.runtimes.base import Runtime


class TorchRuntime(Runtime):
    """Runs `checkpoint` with a cache of `context` tokens."""

    name = "torch"

    def __init__(self, checkpoint: Checkpoint, *, context: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.graph = trace(checkpoint.config, context)
        self.vocab_size, self.context = checkpoint.config.vocab_size, self.graph.context
        self._weights = {name: checkpoint.tensor(name).to(dtype) for name in checkpoint.specs}
        self._caches = Caches(self.graph, dtype=dtype)

    @torch.inference_mode()
    def _forward(self, ids: NDArray[np.int64], position: int, last_only: bool) -> NDArray[np.float32]:
        tokens = torch.from_numpy(ids)[None]
        out = interpret(self.graph, lambda spec: self._weights[spec.name], tokens, position, self._caches, last_only=last_only)
        return out[0].to(torch.float32).numpy()


def open_runtime(path: Path) -> TorchRuntime:
    """Open a checkpoint folder or `.pt` file."""
    return TorchRuntime(open_checkpoint(str(path)))
