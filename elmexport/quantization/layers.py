"""Layer selectors of recipe rules: ranges, and shares of the depth, by which one recipe serves models of all sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from elmexport.errors import ElmExportError


@dataclass(frozen=True)
class Between:
    """Layers `first` … `last`, both included: "0-3"."""

    first: int
    last: int

    def contains(self, layer: int, count: int) -> bool:
        """Whether `layer` is one, in a model of `count` layers."""
        return self.first <= layer <= self.last

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True)
class FirstShare:
    """The first `count // parts` layers: "first 1/8"."""

    parts: int

    def contains(self, layer: int, count: int) -> bool:
        return layer < count // self.parts

    def __str__(self) -> str:
        return f"first 1/{self.parts}"


@dataclass(frozen=True)
class MoreBits:
    """The first and the last eighth, and every third layer between: "more-bits", as `use_more_bits` of llama.cpp's llama-quant.cpp."""

    def contains(self, layer: int, count: int) -> bool:
        eighth = count // 8
        # C's remainder, which differs for negative numbers, is never asked for one: those layers are in the first eighth.
        return layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2

    def __str__(self) -> str:
        return "more-bits"


Layers = Between | FirstShare | MoreBits


def parse_layers(text: str, where: str) -> Layers:
    """Parse a layer selector of a recipe file.

    Raises:
        ElmExportError: none of the forms; `where` is the file's name.
    """
    if (match := re.fullmatch(r"(\d{1,6})-(\d{1,6})", text)) and int(match[1]) <= int(match[2]):
        return Between(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"first 1/([1-9]\d{0,5})", text):
        return FirstShare(int(match[1]))
    if text == "more-bits":
        return MoreBits()
    raise ElmExportError(f'{where}: layers is {text!r}; write a range like "0-3", a share like "first 1/8", or "more-bits"')
