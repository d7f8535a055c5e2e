"""MXFP4 of the OCP Microscaling specification as a scheme: 4-bit floating point in blocks of 32 that share a power of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from elmexport.quantization.schemes import CodedScheme

BLOCK = 32


@dataclass(frozen=True)
class Mxfp4(CodedScheme):
    """`value = element * 2^exponent`, elements being E2M1 numbers (0, ±0.5, 1, 1.5, 2, 3, 4, 6), one exponent of 8 bits (E8M0) a block."""

    width: Literal[4] = 4

    codec: ClassVar[str] = "elmexport.quantization.mxfp4_codec:Mxfp4Codec"
    FORMS: ClassVar[str] = "mxfp4"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        return cls() if name == "mxfp4" else None

    @property
    def recipe_name(self) -> str:
        return "mxfp4"

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """Stored bits of a tensor of `shape`; exponents take 8 bits whatever a scale takes."""
        return math.prod(shape) * self.width + math.prod(shape) // BLOCK * 8

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return f"rows of {shape[-1]} values do not divide into blocks of {BLOCK}" if shape[-1] % BLOCK else None

    def __str__(self) -> str:
        return "4-bit floating point (E2M1) in blocks of 32, power-of-two scales"
