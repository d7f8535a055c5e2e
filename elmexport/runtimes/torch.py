"""Torch runtime, the reference: a checkpoint run by the eager ops, in float32 (or float64), its weights resident."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.graph.device import torch_device
from elmexport.graph.forward import KVCaches, forward
from elmexport.models import trace
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.batching import in_padded_batches


class TorchRuntime(Runtime):
    """Checkpoint in torch, with a cache of `context` tokens, in `dtype`, its weights rounded to `rounded_to` first where given.

    It computes on the device of `ELMEXPORT_TORCH_DEVICE`.
    """

    name = "torch"
    smooth = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        context: int | None = None,
        dtype: torch.dtype = torch.float32,
        rounded_to: torch.dtype | None = None,
    ) -> None:
        """
        Raises:
            ElmExportError: weights that are not finite, or too large for `rounded_to`, or no such device.
        """
        super().__init__()
        self.graph = trace(checkpoint.config, context)
        self.vocab_size, self.context = checkpoint.config.dims.vocab_size, self.graph.context
        self._dtype, self._device = dtype, torch_device()
        self._weights = {name: _rounded(name, checkpoint.tensor(name), rounded_to).to(self._device, dtype) for name in checkpoint.specs}
        self._caches = KVCaches(self.graph, dtype=dtype, device=self._device)

    @torch.inference_mode()
    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        tokens = torch.from_numpy(ids)[None]
        rows: NDArray[np.float32] = self._run(tokens, position, self._caches, last)[0]
        return rows

    @torch.inference_mode()
    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        def read(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            caches = KVCaches(self.graph, len(ids), self._dtype, position + ids.shape[1], self._device)
            caches.copy_prefix(self._caches, position)
            return self._run(torch.from_numpy(ids), position, caches, None)

        return in_padded_batches(continuations, self.context, position, read)

    def _run(self, ids: torch.Tensor, position: int, caches: KVCaches, last: int | None) -> NDArray[np.float32]:
        out = forward(self.graph, lambda spec: self._weights[spec.name], ids, position, caches, last=last)
        return out.to(torch.float32).numpy()


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    if not torch.isfinite(rounded).all():
        raise ElmExportError(f"{name} holds values up to {tensor.abs().max():.4g}, beyond {dtype}'s {torch.finfo(dtype).max:.4g}")
    return rounded


def open_runtime(path: Path) -> TorchRuntime:
    """Open a checkpoint folder or `.pt` file."""
    return TorchRuntime(open_checkpoint(str(path)))
