"""Packed codes mean to onnxruntime's operators what they mean to us."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from elmexport.quantization.quantize import QuantizedTensor
from elmexport.quantization.schemes import Integer, PerBlock, PerChannel
from targets.onnx.packing import pack_codes

ROWS, COLUMNS, BLOCK = 48, 96, 32


@pytest.fixture(params=[4, 8])
def quantized(request: pytest.FixtureRequest) -> QuantizedTensor:
    """Every code, and scales of both signs."""
    scheme = Integer(request.param, PerBlock(BLOCK))
    generator = torch.Generator().manual_seed(0)
    low, high = scheme.range
    codes = torch.arange(low, high + 1, dtype=torch.int8).repeat(ROWS * COLUMNS // 15)[: ROWS * COLUMNS].reshape(ROWS, COLUMNS)
    return QuantizedTensor(scheme, codes, torch.randn(ROWS, COLUMNS // BLOCK, generator=generator).to(torch.float16))


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


def test_matmul_reads_our_codes(quantized: QuantizedTensor) -> None:
    bits: Literal[4, 8] = quantized.scheme.width
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=COLUMNS, N=ROWS, bits=bits, block_size=BLOCK
    )
    scales = quantized.scales.to(torch.float32).numpy()
    columns = run(node, np.eye(COLUMNS, dtype=np.float32), {"codes": pack_codes(quantized), "scales": scales})
    assert np.array_equal(columns.T, quantized.dequantize().numpy())


def test_gather_reads_our_codes(quantized: QuantizedTensor) -> None:
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "x", "scales"],
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=2,
        block_size=BLOCK,
        bits=quantized.scheme.width,
    )
    scales = quantized.scales.to(torch.float32).numpy()[:, :, None]
    rows = run(node, np.arange(ROWS), {"codes": pack_codes(quantized), "scales": scales})
    assert np.array_equal(rows.reshape(ROWS, COLUMNS), quantized.dequantize().numpy())


def test_only_blocks_are_packed() -> None:
    per_row = QuantizedTensor(Integer(8, PerChannel()), torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1, dtype=torch.float16))
    with pytest.raises(AssertionError, match="per output channel"):
        pack_codes(per_row)
