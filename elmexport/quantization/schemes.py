"""Quantization schemes: how one tensor's numbers are represented. Frozen data, no torch.

A scheme says nothing about which tensor gets it (that is a recipe), how codes are found (`quantize`), or how a format packs them (a
target).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from elmexport.errors import ElmExportError

FloatDtype = Literal["fp32", "fp16", "bf16"]
FLOAT_BITS: Mapping[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel (row of `[out, in]`)."""

    def scales(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None

    def __str__(self) -> str:
        return "per output channel"


@dataclass(frozen=True)
class PerBlock:
    """One scale for each `size` consecutive values along the input axis."""

    size: int

    def scales(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.size

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of `shape` cannot take this granularity, None if it can."""
        return f"rows of {shape[-1]} values do not divide into blocks of {self.size}" if shape[-1] % self.size else None

    def __str__(self) -> str:
        return f"in blocks of {self.size}"


Granularity = PerChannel | PerBlock


@dataclass(frozen=True)
class Float:
    """Values stored as floating point."""

    dtype: FloatDtype

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """Stored bits of a tensor of `shape`, each scale taking `scale_bits`."""
        return math.prod(shape) * FLOAT_BITS[self.dtype]

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None

    def __str__(self) -> str:
        return self.dtype


@dataclass(frozen=True)
class Integer:
    """`value = scale * code`, codes being signed integers of `width` bits; one fp16 scale per granule.

    4-bit codes run from -8 to 7, 8-bit codes from -127 to 127 (GGUF's Q4_0 and Q8_0). A scale may be negative: it lets the value of
    largest magnitude take code -8 whichever its sign.
    """

    width: Literal[4, 8]
    granularity: Granularity

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return (-8, 7) if self.width == 4 else (-127, 127)

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        return math.prod(shape) * self.width + self.granularity.scales(shape) * scale_bits

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return self.granularity.refuses(shape)

    def __str__(self) -> str:
        return f"{self.width}-bit symmetric integers {self.granularity}, fp16 scales"


Scheme = Float | Integer

# The names by which recipe files speak of schemes.
SCHEMES: Mapping[str, Scheme] = {
    "fp32": Float("fp32"),
    "fp16": Float("fp16"),
    "bf16": Float("bf16"),
    "int8-block32": Integer(8, PerBlock(32)),
    "int8-channel": Integer(8, PerChannel()),
    "int4-block32": Integer(4, PerBlock(32)),
}


def find_scheme(name: str) -> Scheme:
    """The scheme called `name` in recipe files.

    Raises:
        ElmExportError: no such scheme.
    """
    if name not in SCHEMES:
        raise ElmExportError(f"unknown scheme {name!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def scheme_name(scheme: Scheme) -> str:
    """The inverse of `find_scheme`."""
    return next(name for name, known in SCHEMES.items() if known == scheme)
