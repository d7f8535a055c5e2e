"""ggml's block types as schemes: only ggml's own quantizer finds their codes and scales, so that only GGUF files hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from elmexport.quantization.schemes import Scheme

_PREFIX = "ggml-"


@dataclass(frozen=True)
class GgmlType(Scheme):
    """ggml type: `block` consecutive values of a row in `block_bytes` bytes, scales included; `name` is ggml's ("Q4_K")."""

    name: str
    block: int
    block_bytes: int
    fallback: str | None = None  # the type that llama.cpp takes instead for rows that do not divide into blocks

    FORMS: ClassVar[str]

    @classmethod
    def parse(cls, name: str) -> Self | None:
        kind = _TYPES.get(name.removeprefix(_PREFIX).upper()) if name.startswith(_PREFIX) and name.islower() else None
        return kind if isinstance(kind, cls) else None

    @property
    def recipe_name(self) -> str:
        return _PREFIX + self.name.lower()

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """Stored bits of a tensor of `shape`; `scale_bits` changes nothing, a type's layout is fixed."""
        return math.prod(shape) // self.block * self.block_bytes * 8

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return f"rows of {shape[-1]} values do not divide into {self.name}'s blocks of {self.block}" if shape[-1] % self.block else None

    @property
    def instead(self) -> GgmlType | None:
        return None if self.fallback is None else _TYPES[self.fallback]

    def __str__(self) -> str:
        return f"ggml's {self.name}"


# Sizes: ggml's ggml-common.h. Fallbacks: tensor_type_fallback in llama.cpp's llama-quant.cpp.
_TYPES: Mapping[str, GgmlType] = {
    kind.name: kind
    for kind in (
        GgmlType("Q4_0", 32, 18),
        GgmlType("Q4_1", 32, 20),
        GgmlType("Q5_0", 32, 22),
        GgmlType("Q5_1", 32, 24),
        GgmlType("Q8_0", 32, 34),
        GgmlType("Q2_K", 256, 84, "Q4_0"),
        GgmlType("Q3_K", 256, 110, "Q4_0"),
        GgmlType("Q4_K", 256, 144, "Q5_0"),
        GgmlType("Q5_K", 256, 176, "Q5_1"),
        GgmlType("Q6_K", 256, 210, "Q8_0"),
        GgmlType("IQ4_NL", 32, 18),
        GgmlType("IQ4_XS", 256, 136, "IQ4_NL"),
    )
}
GGML_TYPES = tuple(_TYPES.values())
GgmlType.FORMS = f"{_PREFIX}q4_0 (or {', '.join(name.lower() for name in _TYPES if name != 'Q4_0')})"
