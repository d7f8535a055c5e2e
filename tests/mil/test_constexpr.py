"""Compressed weights against coremltools' own decompression, through packages that its exporter wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from elmexport.mil.blob import BlobFile, unpack
from elmexport.mil.executor import MilModel
from tests.mil.packages import function, write_package

Array = NDArray[Any]
few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
UNSIGNED: Mapping[int, Any] = {1: types.np_uint1_dtype, 2: types.np_uint2_dtype, 3: types.np_uint3_dtype, 4: types.np_uint4_dtype, 6: types.np_uint6_dtype}  # fmt: skip


def both(tmp: Path, operation: str, arguments: Mapping[str, Any], opset: Any = ct.target.iOS18) -> tuple[Array, Array]:
    """The weight as this executor decompresses it, and as coremltools does."""
    theirs = []

    def build(x: Any) -> Any:
        weight = getattr(mb, operation)(**arguments)
        weight = weight[-1] if isinstance(weight, list | tuple) else weight
        value = weight.op.materialized_val_inference()
        theirs.append(np.asarray(value[-1] if isinstance(value, list | tuple) else value))
        return mb.add(x=mb.cast(x=weight, dtype="fp32"), y=x) if opset is ct.target.iOS18 else mb.add(x=weight, y=x)

    number = len(list(tmp.iterdir()))
    half = types.fp32 if opset is ct.target.iOS18 else types.fp16
    made = function({"x": mb.TensorSpec((1,), dtype=half)}, build, opset)
    model = MilModel(write_package(tmp / f"{number}.mlpackage", {"main": made}, 9 if opset is ct.target.iOS18 else 7))
    (ours,) = model.predict({"x": np.zeros(1, np.float32)}).values()
    return ours, theirs[0].astype(np.float32)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
@few
@given(seed=st.integers(0, 1000), blocks=st.sampled_from([1, 2, 4]), offset=st.booleans(), rank=st.sampled_from([2, 4]))
def test_blockwise_shift_scale(dtype: str, seed: int, blocks: int, offset: bool, rank: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    low, high, kind = {
        "int4": (-8, 8, types.np_int4_dtype),
        "uint4": (0, 16, types.np_uint4_dtype),
        "int8": (-128, 128, np.int8),
        "uint8": (0, 256, np.uint8),
    }[dtype]
    tail = (1,) * (rank - 2)
    data = rng.integers(low, high, (6, 8, *tail)).astype(kind)
    scale = rng.standard_normal((rng.choice([1, 3, 6]), blocks, *tail)).astype(np.float16)
    arguments = {"data": data, "scale": scale}
    if offset:
        arguments["offset"] = rng.integers(low, high, scale.shape).astype(kind)
    ours, theirs = both(tmp_path, "constexpr_blockwise_shift_scale", arguments)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@few
@given(
    seed=st.integers(0, 1000),
    groups=st.sampled_from([1, 2, 6]),
    vector=st.sampled_from([1, 2]),
    axis=st.integers(0, 1),
    rank=st.sampled_from([2, 4]),
)
def test_lut_to_dense(bits: int, seed: int, groups: int, vector: int, axis: int, rank: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    tail = (1,) * (rank - 2)
    indices = rng.integers(0, 2**bits, (6, 10, *tail)).astype(UNSIGNED.get(bits, np.uint8))
    lut = rng.standard_normal((groups, 1, *tail, 2**bits, vector)).astype(np.float16)
    ours, theirs = both(tmp_path, "constexpr_lut_to_dense", {"indices": indices, "lut": lut, "vector_axis": axis})
    np.testing.assert_array_equal(ours, theirs)


@few
@given(seed=st.integers(0, 1000))
def test_sparse(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((5, 8)) < 0.5
    mask[0, 0] = True
    bits, count = mask.astype(types.np_uint1_dtype), int(mask.sum())
    values = rng.standard_normal(count).astype(np.float16)
    np.testing.assert_array_equal(*both(tmp_path, "constexpr_sparse_to_dense", {"nonzero_data": values, "mask": bits}))
    codes = rng.integers(-128, 128, count).astype(np.int8)
    scale = rng.standard_normal((5, 2)).astype(np.float16)
    np.testing.assert_array_equal(
        *both(tmp_path, "constexpr_sparse_blockwise_shift_scale", {"data_mask": bits, "nonzero_data": codes, "scale": scale})
    )
    entries = rng.integers(0, 4, count).astype(types.np_uint2_dtype)
    lut = rng.standard_normal((1, 1, 4, 1)).astype(np.float16)
    np.testing.assert_array_equal(
        *both(tmp_path, "constexpr_lut_to_sparse", {"indices_mask": bits, "indices_nonzero_data": entries, "lut": lut})
    )


@few
@given(seed=st.integers(0, 1000), bits=st.sampled_from([1, 2, 4, 6, 8]), vector=st.booleans())
def test_operations_of_ios_16(seed: int, bits: int, vector: bool, tmp_path: Path) -> None:
    rng, opset = np.random.default_rng(seed), ct.target.iOS16
    data = rng.integers(-128, 128, (4, 5)).astype(np.int8)
    scale = rng.random(5).astype(np.float16) if vector else np.float16(0.3)
    zero = rng.integers(-3, 3, 5).astype(np.int8) if vector else np.int8(2)
    ours, theirs = both(
        tmp_path, "constexpr_affine_dequantize", {"quantized_data": data, "scale": scale, "zero_point": zero, "axis": 1}, opset
    )
    np.testing.assert_array_equal(ours, theirs.astype(np.float16))
    shape = np.array([3, 7], np.uint32)
    packed = rng.integers(0, 256, -(-bits * 21 // 8)).astype(np.uint8)
    lut = rng.standard_normal(2**bits).astype(np.float16)
    np.testing.assert_array_equal(*both(tmp_path, "constexpr_lut_to_dense", {"indices": packed, "lut": lut, "shape": shape}, opset))
    mask = rng.random(21) < 0.5
    values = rng.standard_normal(int(mask.sum())).astype(np.float16)
    arguments = {"nonzero_data": values, "mask": np.packbits(mask, bitorder="little"), "shape": shape}
    np.testing.assert_array_equal(*both(tmp_path, "constexpr_sparse_to_dense", arguments, opset))


def test_precision_without_rounding_keeps_the_product(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, scale = rng.integers(-8, 8, (16, 32)).astype(types.np_int4_dtype), rng.standard_normal((16, 1)).astype(np.float16)
    made = function(
        {"x": mb.TensorSpec((32, 1), dtype=types.fp16)},
        lambda x: mb.matmul(x=mb.constexpr_blockwise_shift_scale(data=data, scale=scale), y=x),
    )
    package = write_package(tmp_path / "a.mlpackage", {"main": made})
    exact = data.astype(np.float32) * scale.astype(np.float32)
    unit = {"x": torch.eye(32)[:, 3:4]}
    for precision, weight in (("fp32", exact), ("fp16", exact.astype(np.float16).astype(np.float32))):
        (result,) = MilModel(package, precision=precision).run(unit).values()  # type: ignore[arg-type]
        np.testing.assert_array_equal(result[:, 0].numpy(), weight[:, 3])


def _program(weight: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """Two uses of one weight in two shapes."""

    def build(x: Any) -> Any:
        flat = mb.constexpr_blockwise_shift_scale(**weight)
        deep = mb.constexpr_blockwise_shift_scale(**{name: value[:, :, None, None] for name, value in weight.items()})
        image = mb.expand_dims(x=x, axes=[2, 3])
        return [mb.linear(x=x, weight=flat), mb.conv(x=image, weight=deep)]

    return function({"x": mb.TensorSpec(shape, dtype=types.fp16)}, build)


@pytest.mark.parametrize("budget", [0, 6000, None])
def test_any_budget_gives_the_same(budget: int | None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = {"data": rng.integers(-8, 8, (48, 32)).astype(np.int8), "scale": rng.standard_normal((48, 2)).astype(np.float16)}
    package = write_package(tmp_path / "a.mlpackage", {"main": _program(weight, (1, 32))})
    model = MilModel(package, budget=budget)
    x = torch.from_numpy(rng.standard_normal((1, 32), dtype=np.float32)).half().float()
    expected = x.numpy() @ (weight["data"] * np.repeat(weight["scale"].astype(np.float32), 16, 1)).T
    for _ in range(2):
        linear, conv = model.run({"x": x}).values()
        np.testing.assert_allclose(linear, expected, rtol=2e-3, atol=2e-2)
        np.testing.assert_array_equal(linear.reshape(-1), conv.reshape(-1))


@pytest.mark.parametrize("budget", [0, None])
def test_tables_in_two_shapes(budget: int | None, tmp_path: Path) -> None:
    """One palettized weight as a matrix, as a convolution's, and with other tables: the first two are one tensor, the third is not."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 16, (48, 32)).astype(types.np_uint4_dtype)
    tables, others = (rng.standard_normal((6, 1, 16, 1)).astype(np.float16) for _ in range(2))

    def build(x: Any) -> Any:
        flat, other = (mb.constexpr_lut_to_dense(indices=indices, lut=lut) for lut in (tables, others))
        deep = mb.constexpr_lut_to_dense(indices=indices[:, :, None, None], lut=tables[:, :, None, None])
        image = mb.expand_dims(x=x, axes=[2, 3])
        return [mb.linear(x=x, weight=flat), mb.conv(x=image, weight=deep), mb.linear(x=x, weight=other)]

    made = function({"x": mb.TensorSpec((1, 32), dtype=types.fp16)}, build)
    model = MilModel(write_package(tmp_path / "a.mlpackage", {"main": made}), budget=budget)
    x = torch.from_numpy(rng.standard_normal((1, 32), dtype=np.float32)).half().float()
    linear, conv, different = model.run({"x": x}).values()
    for result, lut in ((linear, tables), (conv.reshape(1, -1), tables), (different, others)):
        weight = np.take_along_axis(lut[:, 0, :, 0], indices.reshape(6, -1).astype(np.int64), 1).reshape(48, 32).astype(np.float32)
        np.testing.assert_allclose(result, x.numpy() @ weight.T, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_unpacking_agrees_with_coremltools(bits: int, tmp_path: Path) -> None:
    from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

    codes = np.random.default_rng(bits).integers(0, 2**bits, 61).astype(np.uint8)
    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    offset = getattr(writer, f"write_uint{bits}_data")(codes)
    del writer
    theirs = getattr(_BlobStorageReader(str(path)), f"read_uint{bits}_data")(offset)
    np.testing.assert_array_equal(BlobFile(path).read(offset, f"uint{bits}", (61,)), theirs)


def test_signed_codes() -> None:
    np.testing.assert_array_equal(unpack(np.array([0x8F, 0x07], np.uint8), 4, 3, signed=True), [-1, -8, 7])
