"""Packages of any size with all shapes and no weights: the target lowers and writes as ever, into a weight file that is holes but for its headers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmexport.models import trace
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.codec import Quantized
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.lut_codec import PalettizedTensor
from elmexport.quantization.recipes import resolve
from elmexport.quantization.schemes import CodedScheme, Float, Integer, PerBlock, PerGroupedChannel
from elmexport.quantization.weight_source import TORCH_DTYPES, Scaled, WeightSource
from elmexport.target import ExportJob
from elmexport.weights import WeightSpec
from targets.coreml import CoreMLTarget

# By what coremltools' writer is asked to write: the type's number in the file, and its bits.
_TYPES = {"fp16": (1, 16), "uint8": (3, 8), "int8": (4, 8), "int4": (8, 4), "uint4": (11, 4), "uint6": (13, 6), "int32": (14, 32)}


class SparseWriter:
    """In the place of coremltools' writer: the same file, every value zero, which takes no room on the disk."""

    def __init__(self, path: str) -> None:
        self.path, self.count, self.end = Path(path), 0, 64
        self.path.touch()

    def __getattr__(self, name: str) -> Any:
        code, bits = _TYPES[name.removeprefix("write_").removesuffix("_data")]

        def write(values: NDArray[Any]) -> int:
            offset, size = self.end, -(-len(values) * bits // 8)
            self.count, self.end = self.count + 1, -(-(offset + 64 + size) // 64) * 64
            with self.path.open("r+b") as file:
                file.write(struct.pack("<II", self.count, 2))
                file.seek(offset)
                file.write(struct.pack("<IIQQQ", 0xDEADBEEF, code, size, offset + 64, 0))
                file.truncate(self.end)
            return offset

        return write


class HollowWeights(WeightSource):
    """Weights of the right shapes and types that take no memory."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan

    def scaled(self, spec: WeightSpec, factor: float) -> Scaled:
        return Scaled(self.get(spec))

    def numbers(self, spec: WeightSpec) -> Tensor:
        return torch.zeros(()).expand(spec.shape)

    def _quantized(self, spec: WeightSpec, scheme: CodedScheme) -> Quantized:
        raise NotImplementedError

    def get(self, spec: WeightSpec) -> Tensor | Quantized:
        scheme = self.scheme(spec)
        if isinstance(scheme, Float):
            return torch.ones((), dtype=TORCH_DTYPES[scheme.dtype]).expand(spec.shape)
        rows, columns = spec.shape
        granularity = scheme.granularity
        if isinstance(scheme, Integer):
            groups = columns // granularity.size if isinstance(granularity, PerBlock) else 1
            scales = torch.ones((), dtype=torch.float16).expand(rows, groups)
            return IntegerTensor(scheme, torch.zeros((), dtype=torch.int8).expand(rows, columns), scales)
        groups = -(-rows // granularity.size) if isinstance(granularity, PerGroupedChannel) else 1
        tables = torch.ones((), dtype=torch.float16).expand(groups, scheme.entries)
        return PalettizedTensor(scheme, torch.zeros((), dtype=torch.uint8).expand(rows, columns), tables)


def hollow_package(folder: Path, config: OpenELMConfig, quant: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Path:
    """What `elmexport coreml` would write into `folder` for a model of `config`, but for the values of the weights."""
    monkeypatch.setattr("targets.coreml.packing.BlobStorageWriter", SparseWriter)
    target = CoreMLTarget(**settings)
    target.check(config, config.max_context_length)
    graph = trace(config, config.max_context_length)
    weights = HollowWeights(resolve(target.recipe(quant), config))
    folder.mkdir()
    target.write(ExportJob("model", config, graph, weights, None, lambda _: None), folder)
    return folder
