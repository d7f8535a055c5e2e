"""Lists what a file of the format holds."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from elmexport.artifact import StoredTensor
from elmexport.models.base import ModelConfig
from elmexport_toy.runtime import ToyWeights
from elmexport_toy.target import FILE


def list_tensors(folder: Path, config: ModelConfig) -> Iterator[StoredTensor]:
    roles = {spec.name: spec.role for spec in config.weights()}
    for name, shape in ToyWeights(folder / FILE).stored_shapes().items():
        yield StoredTensor(name, roles.get(name), "float32", shape, 4 * prod(shape))
