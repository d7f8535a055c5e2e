"""Torch runtime, the reference: a checkpoint run by the eager ops, in float32 (or float64), its weights resident."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.base import Checkpoint
from elmexport.errors import ElmExportError
from elmexport.graph.device import torch_device
from elmexport.graph.forward import KVCaches, forward, step
from elmexport.models import trace
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.batching import FULL_CACHES, in_padded_batches
from elmexport.runtimes.sequences import Sequences
from elmexport.weights import WeightSpec


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
        self.batch_tokens = FULL_CACHES * self.context

    @torch.inference_mode()
    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        tokens = torch.from_numpy(ids)[None]
        rows: NDArray[np.float32] = self.run(tokens, position, self._caches, last)[0]
        return rows

    def _sequences(self, lengths: Sequence[int]) -> Sequences:
        return _TorchSequences(self, [KVCaches(self.graph, 1, self._dtype, length, self._device) for length in lengths])

    @torch.inference_mode()
    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        def read(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            caches = KVCaches(self.graph, len(ids), self._dtype, position + ids.shape[1], self._device)
            caches.copy_prefix(self._caches, position)
            return self.run(torch.from_numpy(ids), position, caches, None)

        return in_padded_batches(continuations, self.context, position, read)

    def run(self, ids: torch.Tensor, position: int, caches: KVCaches, last: int | None) -> NDArray[np.float32]:
        """Logits of `ids` `[batch, tokens]` at `position` of `caches`; of the last `last` tokens where given."""
        out = forward(self.graph, self._weight, ids, position, caches, last=last)
        return out.to(torch.float32).numpy()

    def step(self, ids: torch.Tensor, positions: Sequence[int], caches: Sequence[KVCaches]) -> NDArray[np.float32]:
        """Logits `[sequences, vocab]` of one token each, `ids` `[sequences]`, at its position of its caches."""
        return step(self.graph, self._weight, ids, positions, caches).to(torch.float32).numpy()

    def _weight(self, spec: WeightSpec) -> torch.Tensor:
        return self._weights[spec.name]


class _TorchSequences(Sequences):
    """Sequences with a cache each."""

    def __init__(self, runtime: TorchRuntime, caches: list[KVCaches]) -> None:
        self._runtime, self._caches = runtime, caches

    @torch.inference_mode()
    def read(self, number: int, ids: Sequence[int], position: int) -> NDArray[np.float32]:
        tokens = torch.from_numpy(self._runtime.check_ids(ids))[None]
        row: NDArray[np.float32] = self._runtime.run(tokens, position, self._caches[number], 1)[0, 0]
        return row

    @torch.inference_mode()
    def step(self, numbers: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        return self._runtime.step(torch.tensor(ids), positions, [self._caches[number] for number in numbers])


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
