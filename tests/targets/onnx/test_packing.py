"""Packed codes mean to onnxruntime's operators what they mean to us."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.schemes import Integer, PerBlock, PerChannel
from targets.onnx import BLOCKS
from targets.onnx.packing import pack_codes, pack_flat, pack_zeros

ROWS, COLUMNS = 48, 768
SCHEMES = [
    *(Integer(width, PerBlock(block)) for width in (4, 8) for block in BLOCKS),
    *(
        Integer(4, PerBlock(block), symmetric=False) for block in BLOCKS
    ),  # in blocks of 256 a row has 3 zero points: half a byte is left over
]


@pytest.fixture(params=SCHEMES, ids=lambda scheme: scheme.recipe_name)
def quantized(request: pytest.FixtureRequest) -> IntegerTensor:
    """Every code, scales of both signs, and every zero point."""
    scheme: Integer = request.param
    generator = torch.Generator().manual_seed(0)
    low, high = scheme.range
    blocks = COLUMNS // scheme.block(COLUMNS)
    codes = torch.arange(low, high + 1, dtype=torch.int8).repeat(ROWS * COLUMNS // 15)[: ROWS * COLUMNS].reshape(ROWS, COLUMNS)
    zeros = None if scheme.symmetric else torch.randint(0, 16, (ROWS, blocks), generator=generator, dtype=torch.int8)
    return IntegerTensor(scheme, codes, torch.randn(ROWS, blocks, generator=generator).to(torch.float16), zeros)


def run(node: onnx.NodeProto, data: NDArray[np.generic], initializers: dict[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    """The output `y` of a model of one node with input `x`."""
    kind = helper.np_dtype_to_tensor_dtype(data.dtype)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, data.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    result: NDArray[np.float32] = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": data})[0]
    return result


def attributes(quantized: IntegerTensor) -> dict[str, int]:
    return {"bits": quantized.scheme.width, "block_size": quantized.scheme.block(COLUMNS)}


def product(quantized: IntegerTensor, x: NDArray[np.float32], **more: int) -> NDArray[np.float32]:
    inputs = {"codes": pack_codes(quantized), "scales": quantized.scales.to(torch.float32).numpy()}
    if quantized.zeros is not None:
        inputs["zeros"] = pack_zeros(quantized.zeros)
    sizes = {"K": COLUMNS, "N": ROWS, **attributes(quantized), **more}
    return run(helper.make_node("MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", **sizes), x, inputs)


def test_matmul_reads_our_codes(quantized: IntegerTensor) -> None:
    columns = product(quantized, np.eye(COLUMNS, dtype=np.float32))
    assert np.array_equal(columns.T, quantized.dequantize().numpy())


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_products_in_8_bits(quantized: IntegerTensor, tokens: int) -> None:
    """The kernels that artifacts use: for one token and for many they are not the same."""
    x = np.random.default_rng(0).standard_normal((tokens, COLUMNS), dtype=np.float32)
    expected = x.astype(np.float64) @ quantized.dequantize().numpy().astype(np.float64).T
    error = product(quantized, x, accuracy_level=4) - expected
    assert np.sqrt((error**2).mean() / (expected**2).mean()) < 0.02


@pytest.mark.parametrize(
    "quantized", [scheme for scheme in SCHEMES if scheme.symmetric], indirect=True, ids=lambda scheme: scheme.recipe_name
)
def test_gather_reads_our_codes(quantized: IntegerTensor) -> None:
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "x", "scales"],
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=2,
        **attributes(quantized),
    )
    scales = quantized.scales.to(torch.float32).numpy()[:, :, None]
    rows = run(node, np.arange(ROWS), {"codes": pack_codes(quantized), "scales": scales})
    assert np.array_equal(rows.reshape(ROWS, COLUMNS), quantized.dequantize().numpy())


@pytest.mark.parametrize("engine", ["onnxruntime", "onnx's reference evaluator"])
def test_dequantize_linear_reads_our_codes(quantized: IntegerTensor, engine: str) -> None:
    """As ONNX's own 4- and 8-bit types, blocks along the first axis."""
    width, block = quantized.scheme.width, quantized.scheme.block(COLUMNS)
    kind = TensorProto.INT8 if width == 8 else TensorProto.INT4 if quantized.zeros is None else TensorProto.UINT4

    def stored(name: str, values: torch.Tensor) -> onnx.TensorProto:
        turned = values.t()
        return helper.make_tensor(name, kind, list(turned.shape), pack_flat(turned, width).tobytes(), raw=True)

    scales = quantized.scales.t().to(torch.float32).contiguous().numpy()
    tensors = [stored("codes", quantized.codes), numpy_helper.from_array(scales, "scales")]
    if quantized.zeros is not None:
        tensors.append(stored("zeros", quantized.zeros))
    node = helper.make_node("DequantizeLinear", [tensor.name for tensor in tensors], ["y"], axis=0, block_size=block)
    graph = helper.make_graph([node], "one", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString()) if engine == "onnxruntime" else ReferenceEvaluator(model)
    assert np.array_equal(session.run(None, {})[0].T, quantized.dequantize().numpy())


def test_odd_numbers_of_4_bit_values() -> None:
    assert pack_zeros(torch.tensor([[1, 2, 3], [4, 5, 15]], dtype=torch.int8)).tolist() == [[0x21, 0x03], [0x54, 0x0F]]
    assert pack_flat(torch.tensor([[1, 2, 3], [4, -5, -1], [7, -8, 6]], dtype=torch.int8), 4).tolist() == [0x21, 0x43, 0xFB, 0x87, 0x06]


def test_only_blocks_are_packed() -> None:
    per_row = IntegerTensor(Integer(8, PerChannel()), torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1, dtype=torch.float16))
    with pytest.raises(AssertionError, match="per output channel"):
        pack_codes(per_row)
