"""Quantization schemes: how one tensor's numbers are represented. Frozen data, no torch.

A scheme says nothing about which tensor gets it (that is a recipe), how codes are found (`quantize`), or how a format packs them (a
target, which also says which schemes it can express).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from elmexport.errors import ElmExportError
from elmexport.quantization.ggml import FORMS as GGML_FORMS
from elmexport.quantization.ggml import GgmlType, find_ggml_type, ggml_type_name

FloatDtype = Literal["fp32", "fp16", "bf16"]
FLOAT_BITS: Mapping[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel (row of `[out, in]`)."""

    def count(self, shape: tuple[int, ...]) -> int:
        """Granules of a tensor of `shape`."""
        return shape[0]

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of `shape` cannot take this granularity, None if it can."""
        return None

    def __str__(self) -> str:
        return "per output channel"


@dataclass(frozen=True)
class PerBlock:
    """One scale for each `size` consecutive values along the input axis."""

    size: int

    def count(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.size

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return f"rows of {shape[-1]} values do not divide into blocks of {self.size}" if shape[-1] % self.size else None

    def __str__(self) -> str:
        return f"in blocks of {self.size}"


@dataclass(frozen=True)
class PerTensor:
    """One table for the whole tensor."""

    def count(self, shape: tuple[int, ...]) -> int:
        return 1

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None

    def __str__(self) -> str:
        return "for the whole tensor"


@dataclass(frozen=True)
class PerGroupedChannel:
    """One table for each `size` consecutive output channels."""

    size: int

    def count(self, shape: tuple[int, ...]) -> int:
        return shape[0] // self.size

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return f"{shape[0]} output channels do not divide into groups of {self.size}" if shape[0] % self.size else None

    def __str__(self) -> str:
        return "for each output channel" if self.size == 1 else f"for every {self.size} output channels"


@dataclass(frozen=True)
class Float:
    """Values stored as floating point."""

    dtype: FloatDtype

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """Stored bits of a tensor of `shape`, each scale taking `scale_bits`."""
        return math.prod(shape) * FLOAT_BITS[self.dtype]

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of `shape` cannot take this scheme, None if it can."""
        return None

    def __str__(self) -> str:
        return self.dtype


@dataclass(frozen=True)
class Integer:
    """`value = scale * (code - zero point)`, codes being integers of `width` bits; one fp16 scale per granule.

    Symmetric codes have no zero point: 4-bit ones run from -8 to 7, 8-bit ones from -127 to 127 (GGUF's Q4_0 and Q8_0). A 4-bit scale
    may be negative: it lets the value of largest magnitude take code -8 whichever its sign. Asymmetric codes run from 0 to 15, as do their
    zero points, one per granule.
    """

    width: Literal[4, 8]
    granularity: PerChannel | PerBlock
    symmetric: bool = True

    def __post_init__(self) -> None:
        assert self.symmetric or self.width == 4, "asymmetric codes have 4 bits"

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if not self.symmetric:
            return (0, 15)
        return (-8, 7) if self.width == 4 else (-127, 127)

    def block(self, columns: int) -> int:
        """Values that share a scale, in rows of `columns`."""
        return self.granularity.size if isinstance(self.granularity, PerBlock) else columns

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        each = scale_bits if self.symmetric else scale_bits + self.width
        return math.prod(shape) * self.width + self.granularity.count(shape) * each

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return self.granularity.refuses(shape)

    def __str__(self) -> str:
        kind, extra = ("symmetric", "") if self.symmetric else ("asymmetric", " and 4-bit zero points")
        return f"{self.width}-bit {kind} integers {self.granularity}, fp16 scales{extra}"


@dataclass(frozen=True)
class Lut:
    """`value = table[code]`, codes being indices of `width` bits into a table of `2 ** width` fp16 values (palettization)."""

    width: Literal[4, 6, 8]
    granularity: PerTensor | PerGroupedChannel

    @property
    def entries(self) -> int:
        """Values of a table."""
        return 1 << self.width

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """As for every scheme; table entries take 16 bits whatever a scale takes."""
        return math.prod(shape) * self.width + self.granularity.count(shape) * self.entries * 16

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return self.granularity.refuses(shape)

    def __str__(self) -> str:
        return f"{self.width}-bit indices, a table of {self.entries} fp16 values {self.granularity}"


Scheme = Float | Integer | Lut | GgmlType

# The names by which recipe files speak of schemes: what an error shows, and how one is read.
FORMS = "fp32, fp16, bf16, int4-block32 (or int8, or any other block size), int4-channel (or int8), int4-asym-block32, int4-asym-channel, \
lut4-group8 (or lut6, lut8, or any other group size), lut4-tensor (or lut6, lut8)"
_INTEGER = re.compile(r"int(?:(?P<width>[48])|4(?P<asym>-asym))-(?:block(?P<block>[1-9]\d*)|channel)")
_LUT = re.compile(r"lut(?P<width>[468])-(?:group(?P<group>[1-9]\d*)|tensor)")


def find_scheme(name: str) -> Scheme:
    """The scheme called `name` in recipe files.

    Raises:
        ElmExportError: no such scheme.
    """
    if name in FLOAT_BITS:
        return Float(cast(FloatDtype, name))
    if match := _INTEGER.fullmatch(name):
        block = PerBlock(int(match["block"])) if match["block"] else PerChannel()
        return Integer(8 if match["width"] == "8" else 4, block, symmetric=match["asym"] is None)
    if match := _LUT.fullmatch(name):
        group = PerGroupedChannel(int(match["group"])) if match["group"] else PerTensor()
        return Lut(cast(Literal[4, 6, 8], int(match["width"])), group)
    if (kind := find_ggml_type(name)) is not None:
        return kind
    raise ElmExportError(f"unknown scheme {name!r}; known: {FORMS}, {GGML_FORMS}")


def scheme_name(scheme: Scheme) -> str:
    """The inverse of `find_scheme`."""
    if isinstance(scheme, Float):
        return scheme.dtype
    if isinstance(scheme, GgmlType):
        return ggml_type_name(scheme)
    if isinstance(scheme, Lut):
        group = scheme.granularity
        return f"lut{scheme.width}-" + (f"group{group.size}" if isinstance(group, PerGroupedChannel) else "tensor")
    kind = "" if scheme.symmetric else "-asym"
    block = scheme.granularity
    return f"int{scheme.width}{kind}-" + (f"block{block.size}" if isinstance(block, PerBlock) else "channel")
