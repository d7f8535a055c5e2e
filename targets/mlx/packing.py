"""Weights to MLX's tensors: `weight`, and for quantized ones `scales` and `biases`. No policy; no arithmetic but powers of two.

In mode mxfp4 they are the codes as they are, and exponents as bytes, 127 more. MLX's affine mode is `value = scale * code + bias` with unsigned codes, low bits first in words of 32. Symmetric codes c of b bits are c + 2^(b-1)
there and the bias is -2^(b-1) * scale, exact in fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elmexport.errors import ElmExportError
from elmexport.quantization import packed_bits
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.mxfp4 import BLOCK, Mxfp4
from elmexport.quantization.mxfp4_codec import Mxfp4Tensor
from elmexport.quantization.schemes import CodedScheme, Float, Integer, Scheme
from elmexport.quantization.weight_source import TORCH_DTYPES

if TYPE_CHECKING:
    from elmexport.quantization.codec import Quantized

_CHUNK = 1 << 22  # codes packed at a time

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # type and shape by the last part of a tensor's name


def layout(scheme: Scheme, shape: tuple[int, ...]) -> Layout:
    """List the tensors that store one of `shape`, `[out, in]` or `[dim]`."""
    if isinstance(scheme, Float):
        return {"weight": (TORCH_DTYPES[scheme.dtype], shape)}
    assert isinstance(scheme, CodedScheme), scheme
    facts = parameters(scheme)
    words = (torch.uint32, (*shape[:-1], shape[-1] * facts["bits"] // 32))
    groups = (*shape[:-1], shape[-1] // facts["group_size"])
    if isinstance(scheme, Mxfp4):
        return {"weight": words, "scales": (torch.uint8, groups)}
    return {"weight": words, "scales": (torch.float16, groups), "biases": (torch.float16, groups)}


def parameters(scheme: CodedScheme) -> dict[str, Any]:
    """Describe a scheme as `quantization` of config.json does."""
    if isinstance(scheme, Mxfp4):
        return {"group_size": BLOCK, "bits": scheme.width, "mode": "mxfp4"}
    assert isinstance(scheme, Integer), f"MLX has no place for {scheme}"
    return {"group_size": scheme.block(0), "bits": scheme.width, "mode": "affine"}


def pack(weight: Tensor | Quantized) -> Mapping[str, Tensor]:
    """Give the tensors of `layout` their content.

    Raises:
        ElmExportError: a bias beyond fp16.
    """
    if isinstance(weight, Tensor):
        return {"weight": weight}
    if isinstance(weight, Mxfp4Tensor):
        return {"weight": _words(weight.codes, weight.scheme.width), "scales": weight.exponent_bytes()}
    assert isinstance(weight, IntegerTensor), f"MLX has no place for {weight.scheme}"
    width = weight.scheme.width
    if weight.zeros is None:
        zeros: Tensor | int = 1 << width - 1
        codes = weight.codes.view(torch.uint8) + zeros  # modulo 256: two's complement becomes unsigned
    else:
        zeros, codes = weight.zeros.to(torch.float32), weight.codes.view(torch.uint8)
    biases = (weight.scales.to(torch.float32) * -zeros).to(torch.float16)
    if not torch.isfinite(biases).all():
        raise ElmExportError("weights reach the end of fp16 (65504), where MLX's biases leave it; export with --quant bf16")
    return {"weight": _words(codes, width), "scales": weight.scales, "biases": biases}


def _words(codes: Tensor, width: int) -> Tensor:
    """Pack unsigned codes uint8 `[…, in]` to uint32 `[…, in * width / 32]`, some rows at a time: packing takes many bytes a code for a while."""
    if width == 8:
        return codes.contiguous().view(torch.uint32)
    rows = codes.reshape(-1, codes.shape[-1])
    packed = torch.empty((len(rows), rows.shape[1] * width // 8), dtype=torch.uint8)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        packed[start : start + step] = packed_bits.pack(rows[start : start + step], width)
    return packed.view(*codes.shape[:-1], -1).view(torch.uint32)


def times(weight: Quantized, factor: float) -> tuple[Quantized, float]:
    """Multiply by a power of two that fp16 scales cannot all take exactly: round them. Returns the largest error too, as a part of full scale."""
    assert isinstance(weight, IntegerTensor), f"{weight.scheme} takes any power of two"
    wanted = weight.scales.to(torch.float32) * factor
    scales = wanted.to(torch.float16)
    error = (scales.to(torch.float32) - wanted).abs().amax() / wanted.abs().amax()
    return replace(weight, scales=scales), float(error)
