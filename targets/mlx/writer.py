"""Files of weights: `model.safetensors`, or shards of a size, and their index. One weight is in memory at a time, of experts
those that a module stacks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from elmexport.files import SafetensorsWriter
from elmexport.quantization.schemes import Scheme
from elmexport.quantization.weight_source import Scaled, WeightSource
from elmexport.target import Advance
from targets.mlx.lowering import Entry, Modules
from targets.mlx.packing import Layout, layout, pack, times

INDEX = "model.safetensors.index.json"
METADATA = {"format": "mlx"}


def write_weights(modules: Modules, weights: WeightSource, folder: Path, shard_bytes: int, advance: Advance) -> float:
    """Write every module's tensors, and the index, which mlx-lm writes even of a single file.

    Returns the largest relative error of a scale that could not take its factor exactly, 0 where all could.

    Raises:
        ElmExportError: weights that their scheme cannot hold.
    """
    layouts = {entry.path: layout(_scheme(weights, entry), entry.shape) for entry in modules.entries}
    shards = list(_shards(modules, layouts, shard_bytes))
    weight_map: dict[str, str] = {}
    worst = 0.0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {f"{entry.path}.{part}": kind for entry in shard for part, kind in layouts[entry.path].items()}
        weight_map |= dict.fromkeys(tensors, name)
        with (folder / name).open("wb") as file:
            writer = SafetensorsWriter(file, tensors, METADATA)
            for entry in shard:
                slices = []
                for spec in entry.specs:
                    packed, error = _packed(weights.scaled(spec, entry.factor))
                    slices.append(packed)
                    worst = max(worst, error)
                    advance(spec.size)
                for part in layouts[entry.path]:
                    tensors_of_part = [packed[part] for packed in slices]
                    writer.write(f"{entry.path}.{part}", tensors_of_part[0] if entry.spec.expert is None else torch.stack(tensors_of_part))
            writer.close()
    total = sum(_bytes(parts) for parts in layouts.values())
    parameters = sum(entry.size for entry in modules.entries)
    index: dict[str, Any] = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return worst


def _scheme(weights: WeightSource, entry: Entry) -> Scheme:
    (scheme,) = {weights.scheme(spec) for spec in entry.specs}
    return scheme


def _packed(scaled: Scaled) -> tuple[Any, float]:
    if scaled.rest == 1.0:
        return pack(scaled.weight), 0.0
    rounded, error = times(scaled.weight, scaled.rest)  # type: ignore[arg-type]  # floats take any factor
    return pack(rounded), error


def _shards(modules: Modules, layouts: dict[str, Layout], shard_bytes: int) -> Iterator[list[Entry]]:
    """Modules in runs of at most `shard_bytes`; one that is larger is a shard by itself."""
    shard: list[Entry] = []
    size = 0
    for entry in modules.entries:
        bytes_ = _bytes(layouts[entry.path])
        if shard and size + bytes_ > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += bytes_
    yield shard


def _bytes(parts: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts.values())
