"""Write a checkpoint folder in Hugging Face's layout, so that any client of the published models (mlx-lm, transformers) can open it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from elmexport.checkpoint.safetensors import INDEX, SINGLE
from elmexport.models.base import ModelConfig

if TYPE_CHECKING:
    import torch


def save_checkpoint(folder: Path, config: ModelConfig, tensors: Mapping[str, torch.Tensor], *, shards: int = 1) -> None:
    """Write `config.json` and `tensors` (the names of `config.weights()`) into `folder`.

    One file, or `shards` files of about equal tensor count and an index.

    The folder is made if need be; files of the same name are replaced.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    _write_json(folder / "config.json", {**config.to_dict(), "torch_dtype": dtype})
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / SINGLE, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
