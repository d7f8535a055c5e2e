"""Quantized weights of an artifact, read back with the format's own reader and put under Apple's names.

Nothing of ours takes part: the layouts are those of the formats' specifications.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmexport.models.openelm.config import OpenELMConfig
from elmexport.weights import Role

Weights = dict[str, NDArray[np.float32]]


def quantized_weights(target: str, folder: Path, config: OpenELMConfig) -> Weights:
    """float32 `[out, in]` of every tensor that the artifact stores as integer codes or indices."""
    return {"onnx": _onnx, "gguf": _gguf, "coreml": _coreml, "mlx": _mlx}[target](folder, config)


def _dequantize(codes: NDArray[Any], scales: NDArray[np.floating]) -> NDArray[np.float32]:
    """Codes `[out, in]` times scales `[out, groups]`, exact in float32."""
    rows, groups = scales.shape
    return (codes.reshape(rows, groups, -1).astype(np.float32) * scales.astype(np.float32)[:, :, None]).reshape(rows, -1)


# ONNX: onnx's reader; layouts of MatMulNBits and GatherBlockQuantized as onnxruntime documents its contrib operators.


def _onnx(folder: Path, config: OpenELMConfig) -> Weights:
    import onnx
    from onnx import numpy_helper

    (path,) = (folder / "onnx").glob("*.onnx")
    graph = onnx.load(str(path)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    reshaped = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}

    def array(name: str) -> NDArray[Any]:
        """An initializer, possibly behind a Reshape: rows stay rows, so the shape does not matter here."""
        return numpy_helper.to_array(tensors[name if name in tensors else reshaped[name]])

    # Matrices come in forward order, so their names do not matter.
    specs = [spec for spec in config.weights() if not spec.role.is_norm and spec.role is not Role.EMBEDDING]
    table = next(spec for spec in config.weights() if spec.role is Role.EMBEDDING)
    matmuls = [node for node in graph.node if node.op_type == "MatMulNBits"]
    if config.share_input_output_layers:
        specs.append(table)
    weights: Weights = {}
    if not matmuls:  # the standard operators; that of a tied table, the last one, serves embedding and head
        dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear" and set(node.input) <= set(tensors)]
        for node, spec in zip(dequantized, specs, strict=True):
            codes, scales = (array(name).astype(dtype) for name, dtype in zip(node.input, (np.int16, np.float32), strict=True))
            (axis,) = (attribute.i for attribute in node.attribute if attribute.name == "axis")
            weights[spec.name] = _dequantize(codes, scales) if axis == 1 else _dequantize(codes.T, scales.T)
            assert weights[spec.name].shape == spec.shape
        return weights
    assert len(matmuls) == len(specs)
    for node, spec in zip(matmuls, specs, strict=True):
        facts = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        rows, columns, bits, block = facts["N"], facts["K"], facts["bits"], facts["block_size"]
        assert (rows, columns) == spec.shape
        zeros = np.full((rows, columns // block), 2 ** (bits - 1), np.uint8)
        if len(node.input) > 3 and node.input[3]:
            zeros = _unpack(array(node.input[3]).reshape(rows, -1), bits)[:, : columns // block]
        codes = _unpack(array(node.input[1]).reshape(rows, -1), bits).astype(np.int16) - np.repeat(zeros, block, 1)
        weights[spec.name] = _dequantize(codes, array(node.input[2]).reshape(rows, columns // block))
    gathers = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert len(gathers) == 1
    (gather,) = gathers
    facts = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in gather.attribute}
    bits = facts.get("bits", 4)
    codes = _unpack(array(gather.input[0]).reshape(table.shape[0], -1), bits).astype(np.int16) - 2 ** (bits - 1)
    embedding = _dequantize(codes, array(gather.input[2]).reshape(table.shape[0], -1))
    if table.name in weights:
        assert np.array_equal(weights[table.name], embedding), "the head and the embedding are one tensor"
    weights[table.name] = embedding
    return weights


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of each row; of 4-bit codes, two lie in a byte, the low nibble first."""
    assert packed.dtype == np.uint8
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)


# GGUF: gguf's reader and dequantizer; tensor names as llama.cpp's `openelm` architecture has them.

_GGUF_NAMES = {
    "attn.qkv_proj": ("attn_qkv",),
    "attn.out_proj": ("attn_output",),
    "ffn.proj_1": ("ffn_gate", "ffn_up"),
    "ffn.proj_2": ("ffn_down",),
}


def _gguf(folder: Path, config: OpenELMConfig) -> Weights:
    from gguf import GGUFReader, quants

    tensors = {tensor.name: tensor for path in folder.glob("*.gguf") for tensor in GGUFReader(path).tensors}

    def array(name: str) -> NDArray[np.float32]:
        return quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    weights: Weights = {}
    for spec in config.weights():
        if spec.role.is_norm:
            continue
        if spec.layer is None:
            names = ["token_embd.weight" if spec.role is Role.EMBEDDING else "output.weight"]
        else:
            module = spec.name.removeprefix(f"transformer.layers.{spec.layer}.").removesuffix(".weight")
            names = [f"blk.{spec.layer}.{name}.weight" for name in _GGUF_NAMES[module]]
        if tensors[names[0]].tensor_type.name.startswith("Q"):
            weights[spec.name] = np.concatenate([array(name) for name in names])
    return weights


# Core ML: coremltools' specification, its blob reader, and its own decompression.


def _coreml(folder: Path, config: OpenELMConfig) -> Weights:
    import coremltools

    parts: Weights = {}
    for package in folder.glob("*.mlpackage"):
        spec = coremltools.utils.load_spec(str(package))
        (data,) = package.glob("Data/*/weights/weight.bin")
        function = spec.mlProgram.functions[spec.description.defaultFunctionName or "main"]
        for name, value in _constexprs(function.block_specializations[function.opset], data):
            name = name.removesuffix("_rows")  # the embedding's table; of a tied head's convolution, the same again
            assert name not in parts or np.array_equal(parts[name], value)
            parts[name] = value
    weights: Weights = {}
    for tensor in config.weights():
        stem = tensor.name.replace(".", "_")
        names = [stem] if stem in parts else [f"{stem}_part{i}" for i in range(sum(name.startswith(f"{stem}_part") for name in parts))]
        if names:
            weights[tensor.name] = np.concatenate([parts.pop(name) for name in names])
            assert weights[tensor.name].shape == tensor.shape
    assert not parts, f"quantized tensors of no weight: {sorted(parts)}"
    return weights


def _constexprs(block: Any, data: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name and value `[out, in]` of every `constexpr_blockwise_shift_scale` and `constexpr_lut_to_dense`."""
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_blockwise_shift_scale, constexpr_lut_to_dense
    from coremltools.libmilstoragepython import _BlobStorageReader
    from coremltools.proto import MIL_pb2

    reader = _BlobStorageReader(str(data))
    constants = {op.outputs[0].name: op.attributes["val"] for op in block.operations if op.type == "const"}

    def array(argument: Any) -> NDArray[Any]:
        value = argument.value if argument.HasField("value") else constants[argument.name]
        kind = value.type.tensorType
        dtype = MIL_pb2.DataType.Name(kind.dataType)
        offset = value.blobFileValue.offset
        read = getattr(reader, f"read_{'fp16' if dtype == 'FLOAT16' else dtype.lower()}_data")
        flat = np.asarray(read(offset))
        flat = flat.view(np.float16) if dtype == "FLOAT16" else flat.astype(np.uint8 if dtype.startswith("U") else np.int8)
        return flat.reshape([axis.constant.size for axis in kind.dimensions])

    for op in block.operations:
        if not op.type.startswith("constexpr_"):
            continue
        inputs = {name: array(binding.arguments[0]) for name, binding in op.inputs.items()}
        if op.type == "constexpr_lut_to_dense":
            value = constexpr_lut_to_dense.decompress(inputs["indices"], inputs["lut"], None).astype(np.float32)
        else:
            assert op.type == "constexpr_blockwise_shift_scale"
            # In float32: Core ML's own product is rounded to fp16, which is arithmetic on the weight and not the weight.
            value = constexpr_blockwise_shift_scale.decompress(inputs["data"], inputs["scale"].astype(np.float32), inputs.get("offset"))
        yield op.outputs[0].name, value.reshape(value.shape[:2])


# MLX: its own reader and its own dequantize, in float32.


def _mlx(folder: Path, config: OpenELMConfig) -> Weights:
    import mlx.core as mx

    tensors: dict[str, Any] = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= mx.load(str(path))
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization"]
    weights: Weights = {}
    for name in [name for name in tensors if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        facts = quantization.get(module, quantization)
        scales, biases = (tensors[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        weights[f"{module}.weight"] = np.array(
            mx.dequantize(tensors[f"{module}.weight"], scales, biases, facts["group_size"], facts["bits"], facts["mode"])
        )
    return weights
