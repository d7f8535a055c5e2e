"""Random weights of the right shapes: for speed, size and tests, with no download.

Each tensor depends on the seed and its own name alone, so the order of reading changes nothing, and no tensor is kept. Values come from
numpy's generators: the same on every read, though numpy does not promise the same ones from one of its versions to the next.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.checkpoint.base import Checkpoint, Source
from elmexport.cores import available_cores
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.progress import Progress

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # elements drawn from one stream; small enough that float32 chunks add nothing to the memory in use
_SCHEME = "random weights, scheme 1"  # to be raised with any change of the values


class RandomCheckpoint(Checkpoint):
    """bfloat16 tensors: matrices N(0, 1 / inputs), norm weights 1 + 0.1 N(0, 1)."""

    def __init__(self, config: ModelConfig, name: str, seed: int, tokenizer_path: Path | None = None) -> None:
        """
        Raises:
            ElmExportError: a negative seed.
        """
        if seed < 0:
            raise ElmExportError(f"--random-weights is {seed}; a seed is a whole number from 0 up")
        super().__init__(config, Source(f"{name}-random{seed}", f"random weights, seed {seed}"), tokenizer_path)
        self.seed = seed

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, name: str) -> torch.Tensor:
        import numpy as np
        import torch

        spec = self.specs[name]
        with torch.inference_mode(False):  # the mode is each thread's own: a tensor made in it could not be filled by the others
            out = torch.empty(spec.size, dtype=torch.bfloat16)
        mean, std = (1.0, 0.1) if spec.role.is_norm else (0.0, spec.shape[-1] ** -0.5)

        def fill(chunk: int) -> None:
            key = hashlib.sha256(f"{self.seed} {name} {chunk}".encode()).digest()
            generator = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
            target = out[chunk * CHUNK : (chunk + 1) * CHUNK]
            values = generator.standard_normal(target.numel(), dtype=np.float32)
            target.copy_(torch.from_numpy(values).mul_(std).add_(mean))

        # numpy draws outside the interpreter lock; a stream per chunk makes the values independent of the number of threads.
        with ThreadPoolExecutor(available_cores()) as threads:
            list(threads.map(fill, range(-(-spec.size // CHUNK))))
        return out.view(spec.shape)

    def identity(self, progress: Progress | None = None) -> str:
        return hashlib.sha256(json.dumps([_SCHEME, self.seed, self.config.to_dict()], sort_keys=True).encode()).hexdigest()
