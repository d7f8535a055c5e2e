"""mlx-swift's OpenELM: sizes of the layers from constants of its own, whatever `config.json` lists, and an eps that is fixed.

The formula is that of `OpenELM.swift` (mlx-swift-lm), whose numbers are single precision.
"""

from __future__ import annotations

import numpy as np

from elmexport.graph.dims import LayerDims
from elmexport.models.base import ModelConfig

GQA_GROUPS = 4
QKV_MULTIPLIERS = (0.5, 1.0)
FFN_MULTIPLIERS = (0.5, 4.0)
ROPE_THETA = 10000


def openelm_layers(count: int, model_dim: int, head_dim: int, ffn_divisor: int) -> tuple[LayerDims, ...]:
    """Compute the sizes of `count` layers as mlx-swift does."""
    queries = [_divisible(np.float32(model_dim) * m, head_dim * GQA_GROUPS) // head_dim for m in _multipliers(QKV_MULTIPLIERS, count)]
    ffn = [_divisible(m * np.float32(model_dim), ffn_divisor) for m in _multipliers(FFN_MULTIPLIERS, count)]
    # Rounding may leave the last one out, and the program then ends at a missing layer.
    return tuple(LayerDims(q, q // GQA_GROUPS, f) for q, f in zip(queries, ffn, strict=False))


def openelm_notes(config: ModelConfig, alpha: float) -> tuple[str, ...]:
    """Say why mlx-swift cannot run a model whose residual stream is multiplied by `alpha`; nothing where it can."""
    data, dims = config.to_dict(), config.dims
    reasons = []
    if openelm_layers(len(dims.layers), dims.model_dim, dims.head_dim, data["ffn_dim_divisor"]) != dims.layers:
        reasons.append("it computes other numbers of heads or other widths than this model's layers have")
    if data["rope_freq_constant"] != ROPE_THETA:
        reasons.append(f"its rotary base is {ROPE_THETA}, this model's {data['rope_freq_constant']:g}")
    if alpha != 1:
        reasons.append(f"it reads no rms_norm_eps, which alpha {alpha:g} changes here; --quant bf16 has no alpha")
    return (f"mlx-swift's OpenELM cannot run this artifact, mlx-lm can: {'; '.join(reasons)}",) if reasons else ()


def _multipliers(ends: tuple[float, float], count: int) -> list[np.float32]:
    """Multipliers of the layers: Swift's `stride(from:through:by:)`, rounded to two decimals."""
    start, end = np.float32(ends[0]), np.float32(ends[1])
    step = (end - start) / np.float32(max(count - 1, 1))
    points = [start + np.float32(i) * step for i in range(count)]
    hundred = np.float32(100)
    return [np.float32(np.floor(point * hundred + np.float32(0.5))) / hundred for point in points if point <= end]


def _divisible(value: np.float32, divisor: int) -> int:
    step = np.float32(divisor)
    rounded = max(step, np.float32(int((value + step / 2) / step) * divisor))
    return int(rounded + step if rounded < np.float32(0.9) * value else rounded)
