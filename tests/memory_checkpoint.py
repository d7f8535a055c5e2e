"""A checkpoint that lives in memory: arrays under the names of published files, for tests that need no files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.models.base import ModelConfig
from elmexport.progress import Progress
from elmexport.weights import Role


class MemoryCheckpoint(Checkpoint):
    """`arrays` (float32) under the family's names. They may contradict `config`: `check` finds that, as for any checkpoint."""

    def __init__(
        self, config: ModelConfig, arrays: Mapping[str, NDArray[np.float32]], *, name: str = "small", tokenizer_path: Path | None = None
    ) -> None:
        super().__init__(config, Source(name, "in memory"), tokenizer_path)
        self.arrays = dict(arrays)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.arrays.items()}

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name].copy())

    def identity(self, progress: Progress | None = None) -> str:
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name in sorted(self.arrays):
            digest.update(name.encode() + self.arrays[name].tobytes())
        return digest.hexdigest()


def random_checkpoint(config: ModelConfig, seed: int = 0, *, tokenizer_path: Path | None = None) -> MemoryCheckpoint:
    """Normal weights scaled by fan-in, so that activations stay of order one and logits spread by about two nats."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for spec in config.weights():
        noise = generator.standard_normal(spec.shape, dtype=np.float32)
        if spec.role.is_norm:
            arrays[spec.name] = 1 + np.float32(0.1) * noise
        else:
            gain = 2.0 if spec.role in (Role.EMBEDDING, Role.LM_HEAD) else 1.0
            arrays[spec.name] = noise * np.float32(gain / spec.shape[1] ** 0.5)
    return MemoryCheckpoint(config, arrays, tokenizer_path=tokenizer_path)
