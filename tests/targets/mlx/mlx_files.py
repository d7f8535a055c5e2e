"""MLX folders as their own libraries read them: safetensors and mlx's dequantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

Weights = dict[str, NDArray[np.float32]]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor, in file order."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.offset_keys():
                entry = file.get_slice(name)
                found[name] = (entry.get_dtype(), tuple(entry.get_shape()))
    return found


def weights(folder: Path) -> Weights:
    """float32 `[out, in]` or `[dim]` of every module, dequantized in float32 by mlx."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")
    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= mx.load(str(path))
    quantization = config(folder).get("quantization", {})
    result: Weights = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part != "weight":
            continue
        scales = tensors.get(f"{module}.scales")
        if scales is None:
            assert not quantization or module.endswith("norm") or quantization[module] is False
            result[name] = np.array(tensor.astype(mx.float32))
            continue
        facts = quantization.get(module, quantization)
        how = {"group_size": facts["group_size"], "bits": facts["bits"], "mode": facts.get("mode", "affine")}
        if how["mode"] == "affine":
            biases = tensors[f"{module}.biases"].astype(mx.float32)
            result[name] = np.array(mx.dequantize(tensor, scales.astype(mx.float32), biases, **how))
        else:
            result[name] = np.array(mx.dequantize(tensor, scales, dtype=mx.float32, **how))
    return result
