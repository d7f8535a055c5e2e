"""Schemes: stored bits, shapes they refuse, names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from elmexport.errors import ElmExportError
from elmexport.quantization.schemes import CodedScheme, Integer, Lut, PerBlock, PerChannel, PerGroupedChannel, PerTensor, find_scheme


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp32", 64 * 96 * 32),
        ("fp16", 64 * 96 * 16),
        ("bf16", 64 * 96 * 16),
        ("int8-block32", 64 * 96 * 8 + 64 * 3 * 16),  # 8.5 bits a weight, GGUF's Q8_0
        ("int8-channel", 64 * 96 * 8 + 64 * 16),
        ("int4-block32", 64 * 96 * 4 + 64 * 3 * 16),  # 4.5 bits a weight, GGUF's Q4_0
        ("int3-channel", 64 * 96 * 3 + 64 * 16),
        ("int5-block32", 64 * 96 * 5 + 64 * 3 * 16),  # 5.5 bits a weight, GGUF's Q5_0
        ("int6-block32", 64 * 96 * 6 + 64 * 3 * 16),
        ("int4-block96", 64 * 96 * 4 + 64 * 16),
        ("int4-asym-block32", 64 * 96 * 4 + 64 * 3 * (16 + 4)),  # 4.625 bits a weight
        ("int4-asym-channel", 64 * 96 * 4 + 64 * (16 + 4)),
        ("lut4-group8", 64 * 96 * 4 + 8 * 16 * 16),
        ("lut6-group16", 64 * 96 * 6 + 4 * 64 * 16),
        ("lut8-tensor", 64 * 96 * 8 + 256 * 16),
    ],
)
def test_bits_of_a_matrix(name: str, bits: int) -> None:
    assert find_scheme(name).bits((64, 96)) == bits


def test_wider_scales_count_but_tables_stay_fp16() -> None:
    assert find_scheme("int4-asym-block32").bits((64, 96), 32) == 64 * 96 * 4 + 64 * 3 * (32 + 4)
    assert find_scheme("lut4-group8").bits((64, 96), 32) == find_scheme("lut4-group8").bits((64, 96))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("int4-block64", Integer(4, PerBlock(64))),
        ("int4-block128", Integer(4, PerBlock(128))),
        ("int8-block7", Integer(8, PerBlock(7))),
        ("int3-block32", Integer(3, PerBlock(32))),
        ("int5-block32", Integer(5, PerBlock(32))),
        ("int6-channel", Integer(6, PerChannel())),
        ("int4-channel", Integer(4, PerChannel())),
        ("int4-asym-block16", Integer(4, PerBlock(16), symmetric=False)),
        ("int4-asym-channel", Integer(4, PerChannel(), symmetric=False)),
        ("lut4-group1", Lut(4, PerGroupedChannel(1))),
        ("lut6-group32", Lut(6, PerGroupedChannel(32))),
        ("lut8-tensor", Lut(8, PerTensor())),
    ],
)
def test_a_name_says_what_the_scheme_is(name: str, scheme: CodedScheme) -> None:
    assert find_scheme(name) == scheme
    assert scheme.recipe_name == name


@pytest.mark.parametrize(
    "name",
    [
        "int3",
        "int4",
        "int4-block",
        "int4-block0",
        "int7-block32",
        "int5-asym-block32",
        "int4-block-32",
        "int4-block032",
        "int8-asym-block32",
        "lut5-group8",
        "lut4",
        "lut4-group0",
        "INT4-block32",
    ],
)
def test_unknown_scheme(name: str) -> None:
    with pytest.raises(
        ElmExportError,
        match=rf"unknown scheme '{name}'; known: fp32, .*int4-block32 \(or int3, int5, int6, int8, or any other block size\).*lut4-tensor",
    ):
        find_scheme(name)


def test_schemes_and_recipes_load_no_torch() -> None:
    names = ["int4-block32", "int5-channel", "lut4-tensor", "fp16", "ggml-q4_k"]
    code = f"import sys, elmexport.quantization.recipes as r; [r.find_scheme(name) for name in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_refused_shapes() -> None:
    reason = find_scheme("int4-block32").refuses((64, 80))
    assert reason == "rows of 80 values do not divide into blocks of 32"
    assert find_scheme("lut4-group8").refuses((60, 80)) == "60 output channels do not divide into groups of 8"
    assert find_scheme("int4-block32").refuses((80, 64)) is None
    assert find_scheme("int8-channel").refuses((64, 81)) is None
    assert find_scheme("lut4-tensor").refuses((61, 81)) is None
    assert find_scheme("fp16").refuses((81,)) is None
