"""Dequantized weights: the numbers that an artifact will hold, in the place of the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from elmexport.checkpoint.base import Checkpoint
from elmexport.progress import Progress
from elmexport.quantization.weight_source import WeightSource


class Dequantized(Mapping[str, Tensor]):
    """Mapping of every tensor's name to its values as the artifact will hold them, float32, made when they are asked for."""

    def __init__(self, weights: WeightSource) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights.get(self._weights.specs[name])
        return weight.to(torch.float32) if isinstance(weight, Tensor) else weight.dequantize()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.specs)

    def __len__(self) -> int:
        return len(self._weights.specs)


class DequantizedCheckpoint(Checkpoint):
    """Checkpoint whose weights are those that an artifact will hold: what a runtime for checkpoints can run."""

    def __init__(self, model: Checkpoint, weights: WeightSource) -> None:
        super().__init__(model.config, model.source, model.tokenizer_path)
        self._model, self._tensors = model, Dequantized(weights)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._model.stored_shapes()

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def identity(self, progress: Progress | None = None) -> str:
        raise NotImplementedError("weights under construction have no identity; that of an artifact is in its manifest")
