"""ggml's block types as schemes whose codes and scales this project finds itself: the same bytes in a file, from any method.

A value is `d * scale * level(code) - dmin * minimum`. A block has one `d` (and `dmin`), fp16; each of its sub-blocks has a whole number for a
scale (and a minimum). Types of one sub-block have no such numbers, which count as 1. Sizes and ranges: ggml's ggml-common.h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from elmexport.quantization.ggml import GGML_TYPES, GgmlType
from elmexport.quantization.schemes import CodedScheme, Scheme, find_scheme

_PREFIX = "gguf-"

# ggml's kvalues_iq4nl, the levels of IQ4_NL and IQ4_XS.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class GgmlCoded(CodedScheme):
    """ggml's type `name`: blocks of `block` consecutive values in `block_bytes` bytes, of sub-blocks of `sub` values.

    Codes are integers of `width` bits from `low` up, or, where `low` is None, indices into `IQ4_LEVELS`. `scales` and `minima` are the
    smallest and the largest of those whole numbers; None: all are 1, or (`minima`) there is no minimum.
    """

    name: str
    block: int
    sub: int
    block_bytes: int
    width: int
    low: int | None
    scales: tuple[int, int] | None
    minima: tuple[int, int] | None = None

    codec: ClassVar[str] = "elmexport.quantization.ggml_codec:GgmlCodec"
    has_rtn: ClassVar[bool] = False
    FORMS: ClassVar[str]

    @classmethod
    def parse(cls, name: str) -> Self | None:
        kind = _KINDS.get(name.removeprefix(_PREFIX).upper()) if name.startswith(_PREFIX) and name.islower() else None
        return kind if isinstance(kind, cls) else None

    @property
    def recipe_name(self) -> str:
        return _PREFIX + self.name.lower()

    @property
    def high(self) -> int:
        """The largest code, where codes are integers."""
        assert self.low is not None
        return self.low + (1 << self.width) - 1

    @property
    def has_minimum(self) -> bool:
        """Whether something is taken from every value of a sub-block."""
        return self.minima is not None or self.name in ("Q4_1", "Q5_1")

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """Stored bits of a tensor of `shape`; `scale_bits` changes nothing, a type's layout is fixed."""
        return math.prod(shape) // self.block * self.block_bytes * 8

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return f"rows of {shape[-1]} values do not divide into {self.name}'s blocks of {self.block}" if shape[-1] % self.block else None

    @property
    def instead(self) -> Scheme | None:
        other = next(kind for kind in GGML_TYPES if kind.name == self.name).instead
        return None if other is None else coded(other)

    def __str__(self) -> str:
        return f"ggml's {self.name}"


_KINDS: Mapping[str, GgmlCoded] = {
    kind.name: kind
    for kind in (
        GgmlCoded("Q4_1", 32, 32, 20, 4, 0, None),
        GgmlCoded("Q5_1", 32, 32, 24, 5, 0, None),
        GgmlCoded("Q2_K", 256, 16, 84, 2, 0, (0, 15), (0, 15)),
        GgmlCoded("Q3_K", 256, 16, 110, 3, -4, (-32, 31)),
        GgmlCoded("Q4_K", 256, 32, 144, 4, 0, (0, 63), (0, 63)),
        GgmlCoded("Q5_K", 256, 32, 176, 5, 0, (0, 63), (0, 63)),
        GgmlCoded("Q6_K", 256, 16, 210, 6, -32, (-128, 127)),
        GgmlCoded("IQ4_NL", 32, 32, 18, 4, None, None),
        GgmlCoded("IQ4_XS", 256, 32, 136, 4, None, (-32, 31)),
    )
}
_INTEGERS = {"Q4_0": "int4-block32", "Q5_0": "int5-block32", "Q8_0": "int8-block32"}  # which every format has
GGML_CODED = tuple(_KINDS.values())
GgmlCoded.FORMS = f"{_PREFIX}q4_k (or {', '.join(name.lower() for name in _KINDS if name != 'Q4_K')})"


def coded(kind: GgmlType) -> CodedScheme:
    """The scheme whose codes this project finds, of the same bytes as `kind`."""
    if kind.name not in _INTEGERS:
        return _KINDS[kind.name]
    found = find_scheme(_INTEGERS[kind.name])
    assert isinstance(found, CodedScheme)
    return found
