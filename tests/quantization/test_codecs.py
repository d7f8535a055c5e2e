"""Codecs: what is stored is what is read, in as many bytes as the layout says; and a kind of scheme that nobody knows of but its row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibration.gptq import gptq, output_error
from calibration.weight_set import WeightFacts, WeightSet, weight_writer
from elmexport.errors import ElmExportError
from elmexport.formats import FORMATS
from elmexport.quantization import packed_bits, schemes
from elmexport.quantization.codec import Codec, Part, Quantized, Rounding, find_codec
from elmexport.quantization.grids import Grid
from elmexport.quantization.quantize import quantize
from elmexport.quantization.recipes import load_recipe, resolve
from elmexport.quantization.schemes import CodedScheme, find_scheme
from elmexport.target import find_target
from elmexport.weights import Role, WeightSpec
from tests.memory_checkpoint import MemoryCheckpoint

NAMES = (
    *(
        "int3-block32",
        "int5-block32",
        "int5-channel",
        "int6-block16",
        "int4-block32",
        "int4-channel",
        "int4-asym-block16",
        "int4-asym-channel",
        "int8-block32",
        "int8-channel",
    ),
    *("lut4-group8", "lut4-tensor", "lut6-group4", "lut8-tensor"),
    "mxfp4",
    *("gguf-q4_1", "gguf-q5_1", "gguf-iq4_nl"),
)
KS = ("gguf-q2_k", "gguf-q3_k", "gguf-q4_k", "gguf-q5_k", "gguf-q6_k", "gguf-iq4_xs")  # whose blocks are of 256


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_packed_bits(width: int, rows: int, units: int, seed: int) -> None:
    """Against numpy's own order of bits: code by code, low bits first."""
    codes = np.random.default_rng(seed).integers(0, 1 << width, (rows, 8 * units), dtype=np.uint8)
    bits = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :width]
    expected = np.packbits(bits.reshape(rows, -1), axis=-1, bitorder="little")
    packed = packed_bits.pack(torch.from_numpy(codes), width)
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(packed_bits.unpack(packed, width).numpy(), codes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (n, shape)
        for n in (*NAMES, *KS)
        for shape in ((16, 96), (2, 16, 96), (16, 97), (1, 1), (3, 512))
        if find_scheme(n).refuses(shape) is None
    ],
    ids=str,
)
def test_stored_parts(name: str, shape: tuple[int, ...]) -> None:
    scheme = find_scheme(name)
    assert isinstance(scheme, CodedScheme)
    q = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), scheme)
    codec = find_codec(scheme)
    layout, parts = codec.layout(shape), q.parts()
    assert {part: Part(tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()} == layout
    assert list(parts) == list(layout)
    if shape[-1] == 96 and "asym" not in name and "lut6" not in name:  # zero points take a byte each, 6-bit indices too
        assert sum(part.size for part in layout.values()) * 8 == scheme.bits(shape)
    found = codec.from_parts(parts, shape)
    assert type(found) is type(q) and found.scheme == scheme
    assert found.codes.dtype == q.codes.dtype and torch.equal(found.codes, q.codes)
    assert torch.equal(found.dequantize(), q.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_matrices_is_quantized_like_each(name: str) -> None:
    scheme = find_scheme(name)
    stack = torch.randn(3, 8, 96, generator=torch.Generator().manual_seed(0))
    q = quantize(stack, scheme)
    assert q.codes.shape == q.dequantize().shape == stack.shape
    if not name.endswith("tensor"):  # one table for all
        assert torch.equal(q.dequantize(), torch.stack([quantize(matrix, scheme).dequantize() for matrix in stack]))


def test_kinds_are_known_to_their_modules_and_to_targets_alone() -> None:
    """Nothing else switches on the kind of a scheme."""
    root = Path(schemes.__file__).parents[2]
    own = {root / "elmexport" / "quantization" / f"{name}.py" for name in ("schemes", "integers", "integer_codec", "lut_codec")}
    sources = [path for folder in ("elmexport", "calibration") for path in (root / folder).rglob("*.py") if path not in own]
    assert len(sources) > 100
    kinds = re.compile(r"\b(Integer|Lut|IntegerTensor|PalettizedTensor|PerBlock|PerGroupedChannel)\b")
    assert [str(path) for path in sources if kinds.search(path.read_text(encoding="utf-8"))] == []


# A kind of scheme in one module, its row in the registry, and nothing else: signs times the mean magnitude of each row.


@dataclass(frozen=True)
class Sign(CodedScheme):
    """`value = scale * code`, codes -1 and 1, one float32 scale for each row."""

    width: int = 1

    codec: ClassVar[str] = f"{__name__}:SignCodec"
    FORMS: ClassVar[str] = "sign-row"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        return cls() if name == "sign-row" else None

    @property
    def recipe_name(self) -> str:
        return "sign-row"

    def bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        return shape[0] * (shape[1] + 32)

    def __str__(self) -> str:
        return "signs, fp32 scales"


@dataclass(frozen=True)
class SignTensor(Quantized):
    scheme: Sign
    codes: Tensor
    scales: Tensor  # [out, 1]

    def dequantize(self) -> Tensor:
        return self.codes * self.scales

    def scaled(self, factor: float) -> SignTensor:
        return SignTensor(self.scheme, self.codes, self.scales * factor)

    def parts(self) -> dict[str, Tensor]:
        return {"codes": packed_bits.pack((self.codes > 0).to(torch.uint8), 1), "scales": self.scales}

    def grid(self) -> SignGrid:
        return SignGrid(self)


class SignCodec(Codec):
    scheme: Sign

    def quantize(self, weight: Tensor, method: Rounding, importance: Tensor | None) -> SignTensor:
        return SignTensor(self.scheme, torch.where(weight < 0, -1, 1).to(torch.int8), weight.float().abs().mean(1, keepdim=True))

    def layout(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"codes": Part(torch.uint8, (shape[0], shape[1] // 8)), "scales": Part(torch.float32, (shape[0], 1))}

    def from_parts(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> SignTensor:
        return SignTensor(self.scheme, packed_bits.unpack(parts["codes"], 1).to(torch.int8) * 2 - 1, parts["scales"])

    def beyond(self, low: float, high: float) -> str | None:
        return None


class SignGrid(Grid):
    def __init__(self, start: SignTensor) -> None:
        self.scheme, self.signs, self.parameters = start.scheme, start.codes.t().float().contiguous(), start.scales.t().contiguous()

    def round(self, column: int, target: Tensor) -> Tensor:
        self.signs[column] = torch.where(target < 0, -1.0, 1.0)
        return self.signs[column] * self.parameters[0]

    def expand(self, parameters: Tensor) -> Tensor:
        return self.signs * parameters

    def reduce(self, matrix: Tensor) -> Tensor:
        return (matrix * self.signs).sum(0, keepdim=True)

    def squares(self, diagonal: Tensor) -> Tensor:
        return diagonal.sum().expand(self.parameters.shape)

    def set(self, parameters: Tensor) -> None:
        self.parameters = parameters

    def result(self) -> SignTensor:
        return SignTensor(self.scheme, self.signs.t().to(torch.int8).contiguous(), self.parameters.t().contiguous())


@pytest.fixture
def sign(monkeypatch: pytest.MonkeyPatch) -> Sign:
    monkeypatch.setattr(schemes, "KINDS", {**schemes.KINDS, "sign": f"{__name__}:Sign"})
    scheme = find_scheme("sign-row")
    assert isinstance(scheme, Sign)
    return scheme


def test_a_new_kind_is_a_module_and_a_row(sign: Sign, small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    """Named in a recipe file, quantized, by GPTQ too, kept in a weight set; refused by every format, which each say what they hold."""
    with pytest.raises(ElmExportError, match=r"unknown scheme 'sign-column'; known: .*sign-row"):
        find_scheme("sign-column")
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nwords = "signs"\nactivations = "fp32"\nnorms = "fp32"\nscales = "fp32"\nfallback = "fp32"\nmax_self_check_kl = 1\n'
        '[[rule]]\nscheme = "sign-row"\n'
    )
    recipe = load_recipe(path)
    plan = resolve(recipe, small_checkpoint.config)
    assert recipe.to_dict()["rule"] == [{"scheme": "sign-row"}]
    name = "transformer.layers.1.attn.qkv_proj.weight"
    assert plan.schemes[name] == sign

    weight = small_checkpoint.tensor(name)
    x = torch.randn(400, weight.shape[1], generator=torch.Generator().manual_seed(0)) @ torch.randn(weight.shape[1], weight.shape[1])
    hessian = x.T @ x / len(x)
    plain, fitted = quantize(weight, sign), gptq(weight, sign, hessian)
    assert output_error(weight - fitted.dequantize(), hessian) < 0.7 * output_error(weight - plain.dequantize(), hessian)

    spec = WeightSpec(name, tuple(weight.shape), Role.ATTENTION_QKV)
    facts = WeightFacts("small", "", {name: "sign-row"}, (), "gptq", False, "a text", "00", 5, "0")
    with weight_writer(tmp_path / "set.safetensors", facts, {name: spec}) as writer:
        writer.add(spec, fitted)
    assert torch.equal(WeightSet.load(tmp_path / "set.safetensors").get(spec).dequantize(), fitted.dequantize())

    for target in FORMATS:
        reason = find_target(target).refuses(sign, Role.ATTENTION_QKV)
        assert reason is not None and reason.startswith("stores ")
