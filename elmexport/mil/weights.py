"""Weight store: constants as tensors, read or decompressed when first used, kept while a byte budget lasts, shared by functions.

A tensor that is used in two shapes which differ by axes of length one (an embedding `[vocab, dim]` tied to a convolution
`[vocab, dim, 1, 1]`) is decompressed and kept once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmexport.mil.blob import BlobFile
from elmexport.mil.constexpr import CONSTEXPR
from elmexport.mil.program import BlobFileValue, ImmediateValue

_ROUNDED_ROWS = 256  # rounded at a time, which stay in the cache
_GRIDS = {"constexpr_blockwise_shift_scale": ("data", ("scale", "offset")), "constexpr_lut_to_dense": ("indices", ("lut",))}


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed constant: output number `output` of a `constexpr_*` operation over constants; `round` if that output is fp16."""

    type: str
    arguments: Mapping[str, Constant]
    output: int
    shape: tuple[int, ...]
    round: bool


Constant = BlobFileValue | ImmediateValue | Compressed


def default_budget() -> int:
    """Memory for decompressed weights, in bytes: a third of the machine's.

    What is kept is float32, and the largest model has to run in 16 GiB beside its own file.
    """
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3 if hasattr(os, "sysconf") else 4 << 30


class WeightStore:
    """Constants of a program as tensors. `round_fp16`: round what decompresses to fp16, as any operation's result.

    `budget` is the number of bytes that are kept (default: `default_budget`).
    """

    def __init__(self, files: Mapping[Path, BlobFile], *, round_fp16: bool = True, budget: int | None = None) -> None:
        self._files, self._round = files, round_fp16
        self._left = default_budget() if budget is None else budget
        self._kept: dict[Hashable, Tensor] = {}

    def fetcher(self, constant: BlobFileValue | Compressed) -> Callable[[], Tensor]:
        """A function that gives the constant as a tensor: float32 for any float type, int32 for any integer, bool. Not to be written to."""
        key, kept, shape = self._key(constant), self._kept, constant.shape

        def fetch() -> Tensor:
            tensor = kept.get(key)
            return (self._load(constant, key) if tensor is None else tensor).view(shape)

        return fetch

    def fetch(self, constant: Constant) -> Tensor:
        """The constant as a tensor, once."""
        return to_tensor(constant.value) if isinstance(constant, ImmediateValue) else self.fetcher(constant)()

    def _load(self, constant: BlobFileValue | Compressed, key: Hashable) -> Tensor:
        if isinstance(constant, BlobFileValue):
            tensor = to_tensor(self._files[constant.file].read(constant.offset, constant.dtype, constant.shape))
        else:
            tensor = self._decompress(constant).contiguous()
        size = tensor.numel() * tensor.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[key] = tensor
        else:
            for file in self._files.values():
                file.release()
        return tensor

    def _decompress(self, constant: Compressed) -> Tensor:
        arguments = {name: self._raw(argument) for name, argument in constant.arguments.items() if name != "output_dtype"}
        result = CONSTEXPR[constant.type](**arguments)
        tensor = result[constant.output] if isinstance(result, tuple) else result
        if constant.round and self._round:
            for part in torch.split(tensor, _ROUNDED_ROWS) if tensor.ndim else (tensor,):
                part.copy_(part.half())
        return tensor

    def _raw(self, constant: Constant) -> Tensor:
        """As `CONSTEXPR` wants it: codes stay bytes."""
        if isinstance(constant, Compressed):
            return self._decompress(constant)
        array = (
            constant.value
            if isinstance(constant, ImmediateValue)
            else self._files[constant.file].read(constant.offset, constant.dtype, constant.shape)
        )
        assert isinstance(array, np.ndarray)
        return torch.from_numpy(array) if array.dtype in (np.int8, np.uint8) else to_tensor(array)

    def _key(self, constant: Constant) -> Hashable:
        """Equal for two constants of the same bytes and the same values, whatever axes of length one they carry."""
        if isinstance(constant, ImmediateValue):
            value = constant.value
            return value if isinstance(value, str) else (value.dtype.str, value.shape, value.tobytes())
        if isinstance(constant, BlobFileValue):
            return constant.file, constant.offset, constant.dtype, _squeezed(constant.shape)
        keys = {name: self._key(argument) for name, argument in constant.arguments.items()}
        if constant.type in _GRIDS and "vector_axis" not in constant.arguments:
            # Which axes of length one may go: those of the data, from everything that is laid over it.
            data, over = _GRIDS[constant.type]
            codes = constant.arguments[data]
            shape = constant.shape if isinstance(codes, ImmediateValue) else codes.shape
            for name in over:
                argument = constant.arguments.get(name)
                if isinstance(argument, BlobFileValue) and len(argument.shape) >= len(shape):
                    kept = tuple(g for d, g in zip(shape, argument.shape, strict=False) if d != 1) + argument.shape[len(shape) :]
                    keys[name] = (argument.file, argument.offset, argument.dtype, kept)
        return constant.type, constant.output, constant.round, tuple(sorted(keys.items(), key=lambda item: item[0]))


def to_tensor(value: NDArray[Any] | str) -> Tensor:
    """Convert an array to a float32, int32 or bool tensor."""
    assert isinstance(value, np.ndarray), "a string is not a tensor"
    tensor = torch.from_numpy(value)
    return tensor if tensor.dtype == torch.bool else tensor.to(torch.float32 if tensor.is_floating_point() else torch.int32)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
