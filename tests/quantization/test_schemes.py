"""Schemes: stored bits, shapes they refuse, names."""

from __future__ import annotations

import pytest

from elmexport.errors import ElmExportError
from elmexport.quantization.schemes import SCHEMES, find_scheme, scheme_name


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp32", 64 * 96 * 32),
        ("fp16", 64 * 96 * 16),
        ("bf16", 64 * 96 * 16),
        ("int8-block32", 64 * 96 * 8 + 64 * 3 * 16),  # 8.5 bits a weight, GGUF's Q8_0
        ("int8-channel", 64 * 96 * 8 + 64 * 16),
        ("int4-block32", 64 * 96 * 4 + 64 * 3 * 16),  # 4.5 bits a weight, GGUF's Q4_0
    ],
)
def test_bits_of_a_matrix(name: str, bits: int) -> None:
    assert find_scheme(name).bits((64, 96)) == bits


def test_every_scheme_is_found_by_the_name_it_is_recorded_under() -> None:
    assert [scheme_name(scheme) for scheme in SCHEMES.values()] == list(SCHEMES)
    assert len({str(scheme) for scheme in SCHEMES.values()}) == len(SCHEMES)


def test_unknown_scheme() -> None:
    with pytest.raises(ElmExportError, match=r"unknown scheme 'int3'; known: fp32, .*int4-block32"):
        find_scheme("int3")


def test_refused_shapes() -> None:
    reason = find_scheme("int4-block32").refuses((64, 80))
    assert reason == "rows of 80 values do not divide into blocks of 32"
    assert find_scheme("int4-block32").refuses((80, 64)) is None
    assert find_scheme("int8-channel").refuses((64, 81)) is None
    assert find_scheme("fp16").refuses((81,)) is None
