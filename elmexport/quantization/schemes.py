"""Quantization schemes: how one tensor's numbers are represented. Frozen data, no torch.

A scheme says nothing about which tensor gets it (that is a recipe), how codes are found (its codec, `elmexport.quantization.codec`), or how a
format packs them (a target, which also says which schemes it can express). `KINDS` lists the classes of schemes that there are.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Literal, Self, cast

from elmexport.errors import ElmExportError

FloatDtype = Literal["fp32", "fp16", "bf16"]
LONGEST_NAME = 64  # of a scheme in a recipe file
FLOAT_BITS: Mapping[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16}

# Class of the schemes whose names in recipe files begin with these letters: "int" of "int4-block32".
KINDS: Mapping[str, str] = {
    "fp": "elmexport.quantization.schemes:Float",
    "bf": "elmexport.quantization.schemes:Float",
    "int": "elmexport.quantization.schemes:Integer",
    "lut": "elmexport.quantization.schemes:Lut",
    "mxfp": "elmexport.quantization.mxfp4:Mxfp4",
    "ggml": "elmexport.quantization.ggml:GgmlType",
    "gguf": "elmexport.quantization.ggml_coded:GgmlCoded",
}


class Scheme(ABC):
    """A representation of the numbers of one tensor. Subclasses are frozen dataclasses; `str` describes one in words."""

    FORMS: ClassVar[str]  # the names that `parse` reads, for error messages

    @classmethod
    @abstractmethod
    def parse(cls, name: str) -> Self | None:
        """The scheme that recipe files call `name`; None where it is not one of this class."""

    @property
    @abstractmethod
    def recipe_name(self) -> str:
        """Name of the scheme in recipe files, "int4-block32": the inverse of `parse`."""

    @abstractmethod
    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """Stored bits of a tensor of `shape`, each scale taking `scale_bits`."""

    def zero_bits(self, shape: tuple[int, ...]) -> int:
        """Those of `bits` that are zero points', which formats with biases do not store."""
        return 0

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Reason why a tensor of `shape` cannot take this scheme, None if it can."""
        return None

    @property
    def instead(self) -> Scheme | None:
        """The scheme for shapes that this one refuses; None where it names none, and the recipe's fallback counts."""
        return None


class CodedScheme(Scheme):
    """Integer codes and parameters (scales, tables) that this project finds itself: by the codec that the scheme brings."""

    codec: ClassVar[str]  # "module:Class" of its `elmexport.quantization.codec.Codec`, imported when it is first used
    width: int  # bits of a code
    has_rtn: ClassVar[bool] = True  # whether rounding to nearest is defined: parameters that are searched have no such rule
    is_slow: ClassVar[bool] = False  # whether finding the codes of a model takes several times as long as exporting it does otherwise

    @property
    def is_coarse(self) -> bool:
        """Whether codes are so few that finding them well pays for an embedding: 8-bit ones cost next to nothing."""
        return self.width < 8

    @property
    def uses_importance(self) -> bool:
        """Whether the importance of input channels changes what `mse` finds."""
        return True

    @property
    def row_group(self) -> int:
        """Consecutive rows that share parameters which other rows do not have; 1 where each row has its own, or all share the same."""
        return 1


@dataclass(frozen=True)
class PerChannel:
    """Granularity of one scale for each output channel (row of `[…, out, in]`)."""

    def count(self, shape: tuple[int, ...]) -> int:
        """Groups of a tensor of `shape`: sets of values that share a scale or a table."""
        return math.prod(shape[:-1])

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Reason why a tensor of `shape` cannot take this granularity, None if it can."""
        return None

    def __str__(self) -> str:
        return "per output channel"


@dataclass(frozen=True)
class PerBlock:
    """Granularity of one scale for each `size` consecutive values along the input axis."""

    size: int

    def count(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.size

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return f"rows of {shape[-1]} values do not divide into blocks of {self.size}" if shape[-1] % self.size else None

    def __str__(self) -> str:
        return f"in blocks of {self.size}"


@dataclass(frozen=True)
class PerTensor:
    """Granularity of one table for the whole tensor."""

    def count(self, shape: tuple[int, ...]) -> int:
        return 1

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None

    def __str__(self) -> str:
        return "for the whole tensor"


@dataclass(frozen=True)
class PerGroupedChannel:
    """Granularity of one table for each `size` consecutive output channels."""

    size: int

    def count(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[:-1]) // self.size

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return f"{shape[-2]} output channels do not divide into groups of {self.size}" if shape[-2] % self.size else None

    def __str__(self) -> str:
        return "for each output channel" if self.size == 1 else f"for every {self.size} output channels"


@dataclass(frozen=True)
class Float(Scheme):
    """Values stored as floating point."""

    dtype: FloatDtype

    FORMS: ClassVar[str] = ", ".join(FLOAT_BITS)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        return cls(cast(FloatDtype, name)) if name in FLOAT_BITS else None

    @property
    def recipe_name(self) -> str:
        return self.dtype

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        return math.prod(shape) * FLOAT_BITS[self.dtype]

    def __str__(self) -> str:
        return self.dtype


@dataclass(frozen=True)
class Integer(CodedScheme):
    """Integer quantization: `value = scale * (code - zero point)`, codes being integers of `width` bits.

    Each group of values has one fp16 scale.

    Symmetric codes have no zero point. Those below 8 bits take the whole range of two's complement, 4-bit ones from -8 to 7, 5-bit ones from
    -16 to 15 (GGUF's Q4_0 and Q5_0); their scale may be negative, which lets the value of largest magnitude take the lowest code whichever its
    sign. 8-bit ones run from -127 to 127 (Q8_0). Asymmetric codes run from 0 to 15, as do their zero points, one per group.
    """

    width: Literal[3, 4, 5, 6, 8]
    granularity: PerChannel | PerBlock
    symmetric: bool = True

    codec: ClassVar[str] = "elmexport.quantization.integer_codec:IntegerCodec"
    FORMS: ClassVar[str] = (
        "int4-block32 (or int3, int5, int6, int8, or any other block size), int4-channel (or int3, …), int4-asym-block32, int4-asym-channel"
    )
    _NAME: ClassVar[re.Pattern[str]] = re.compile(r"int(?:(?P<width>[34568])|4(?P<asym>-asym))-(?:block(?P<block>[1-9]\d*)|channel)")

    def __post_init__(self) -> None:
        assert self.symmetric or self.width == 4, "asymmetric codes have 4 bits"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = cls._NAME.fullmatch(name)
        if match is None:
            return None
        block = PerBlock(int(match["block"])) if match["block"] else PerChannel()
        return cls(cast(Literal[3, 4, 5, 6, 8], int(match["width"] or 4)), block, symmetric=match["asym"] is None)

    @property
    def recipe_name(self) -> str:
        kind = "" if self.symmetric else "-asym"
        block = self.granularity
        return f"int{self.width}{kind}-" + (f"block{block.size}" if isinstance(block, PerBlock) else "channel")

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if not self.symmetric:
            return (0, 15)
        half = 1 << self.width - 1
        return (-127, 127) if self.width == 8 else (-half, half - 1)

    @property
    def uses_importance(self) -> bool:
        return self.width < 8  # 8-bit scales come from the largest value

    def block(self, columns: int) -> int:
        """Values that share a scale, in rows of `columns`."""
        return self.granularity.size if isinstance(self.granularity, PerBlock) else columns

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        return math.prod(shape) * self.width + self.granularity.count(shape) * scale_bits + self.zero_bits(shape)

    def zero_bits(self, shape: tuple[int, ...]) -> int:
        return 0 if self.symmetric else self.granularity.count(shape) * self.width

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return self.granularity.refuses(shape)

    def __str__(self) -> str:
        kind, extra = ("symmetric", "") if self.symmetric else ("asymmetric", " and 4-bit zero points")
        return f"{self.width}-bit {kind} integers {self.granularity}, fp16 scales{extra}"


@dataclass(frozen=True)
class Lut(CodedScheme):
    """Palettization: `value = table[code]`, codes being indices of `width` bits into a table of `2 ** width` fp16 values."""

    width: Literal[4, 6, 8]
    granularity: PerTensor | PerGroupedChannel

    codec: ClassVar[str] = "elmexport.quantization.lut_codec:LutCodec"
    has_rtn: ClassVar[bool] = False
    is_slow: ClassVar[bool] = True
    FORMS: ClassVar[str] = "lut4-group8 (or lut6, lut8, or any other group size), lut4-tensor (or lut6, lut8)"
    _NAME: ClassVar[re.Pattern[str]] = re.compile(r"lut(?P<width>[468])-(?:group(?P<group>[1-9]\d*)|tensor)")

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = cls._NAME.fullmatch(name)
        if match is None:
            return None
        return cls(cast(Literal[4, 6, 8], int(match["width"])), PerGroupedChannel(int(match["group"])) if match["group"] else PerTensor())

    @property
    def recipe_name(self) -> str:
        group = self.granularity
        return f"lut{self.width}-" + (f"group{group.size}" if isinstance(group, PerGroupedChannel) else "tensor")

    @property
    def entries(self) -> int:
        """Values of a table."""
        return 1 << self.width

    @property
    def row_group(self) -> int:
        return self.granularity.size if isinstance(self.granularity, PerGroupedChannel) else 1

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """Stored bits of a tensor of `shape`; table entries take 16 bits whatever a scale takes."""
        return math.prod(shape) * self.width + self.granularity.count(shape) * self.entries * 16

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return self.granularity.refuses(shape)

    def __str__(self) -> str:
        return f"{self.width}-bit indices, a table of {self.entries} fp16 values {self.granularity}"


def find_scheme(name: str) -> Scheme:
    """The scheme called `name` in recipe files.

    Raises:
        ElmExportError: no such scheme.
    """
    letters = re.match("[a-z]*", name)
    assert letters is not None
    row = KINDS.get(letters[0])
    scheme = None if row is None or len(name) > LONGEST_NAME else _load(row).parse(name)
    if scheme is None:
        known = dict.fromkeys(_load(row).FORMS for row in KINDS.values())
        raise ElmExportError(f"unknown scheme {name!r}; known: {', '.join(known)}")
    return scheme


def _load(row: str) -> type[Scheme]:
    module, _, name = row.partition(":")
    return cast(type[Scheme], getattr(import_module(module), name))
