"""Writes the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.target import ExportJob, Target, option

FILE = "model.toy"


@dataclass(frozen=True)
class ToyTarget(Target):
    """`model.toy`, an `.npz` under another name: the weights by name, and `context`."""

    order: str = field(default="model", metadata=option("Order of the tensors in the file.", choices=("model", "name")))
    most_layers: int | None = field(default=None, metadata=option("Refuse models of more layers.", metavar="N"))

    name: ClassVar[str] = "toy"
    quants: ClassVar[tuple[str, ...]] = ("int8", "fp32")
    quants_note: ClassVar[str] = "All are stored as float32."
    example: ClassVar[str] = "--model tiny --order name"

    def check(self, config: ModelConfig, context: int) -> None:
        layers = len(config.dims.layers)
        if self.most_layers is not None and layers > self.most_layers:
            raise ElmExportError(f"the model has {layers} layers, --most-layers allows {self.most_layers}")

    def write(self, job: ExportJob, folder: Path) -> None:
        import numpy as np
        import torch

        arrays = {}
        for spec in (spec for node in job.graph.nodes for spec in node.weights.values()):
            weight = job.weights.get(spec)
            dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
            arrays[spec.name] = dense.to(torch.float32).numpy()
            job.advance(spec.size)
        with (folder / FILE).open("wb") as file:
            np.savez(file, context=job.graph.context, **dict(sorted(arrays.items()) if self.order == "name" else arrays))
        job.write_description(folder)

    def tools(self) -> Mapping[str, str]:
        return {"elmexport-toy": "1.0"}
