"""Layers of a recipe's rules, by depth."""

from __future__ import annotations

import pytest

from elmexport.errors import ElmExportError
from elmexport.quantization.layers import parse_layers


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("1-3", 6, [1, 2, 3]),
        ("4-9", 6, [4, 5]),
        ("first 1/8", 7, []),
        ("first 1/8", 16, [0, 1]),
        ("first 1/16", 36, [0, 1]),
        # As `use_more_bits` gives them, worked out by hand.
        ("more-bits", 6, [2, 5]),
        ("more-bits", 16, [0, 1, 4, 7, 10, 13, 14, 15]),
        ("more-bits", 20, [0, 1, 4, 7, 10, 13, 16, 17, 18, 19]),
    ],
)
def test_which_layers(text: str, count: int, expected: list[int]) -> None:
    layers = parse_layers(text, "test.toml")
    assert [layer for layer in range(count) if layers.contains(layer, count)] == expected
    assert str(layers) == text


@pytest.mark.parametrize("text", ["", "3", "5-2", "first 1/0", "first 2/8", "last 1/8", "More-Bits"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(
        ElmExportError, match=r'^test\.toml: layers is .*; write a range like "0-3", a share like "first 1/8", or "more-bits"'
    ):
        parse_layers(text, "test.toml")
