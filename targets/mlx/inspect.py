"""The tensors of an MLX artifact, as safetensors' reader finds them: a module's codes, scales and biases count as one."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from elmexport.artifact import StoredTensor
from elmexport.documents import decode_json
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from elmexport.weights import Role
from targets.mlx.lowering import path as module_path

_WIDTHS = {"U32": 4, "U8": 1, "F16": 2, "BF16": 2, "F32": 4}  # bytes


def list_tensors(folder: Path, config: ModelConfig) -> Iterator[StoredTensor]:
    """List every weight of the folder's safetensors files, in file order.

    Raises:
        ElmExportError: a file that the reader cannot make sense of.
    """
    from safetensors import SafetensorError, safe_open

    roles = {module_path(spec): spec.role for spec in config.weights()}
    roles.setdefault(config.head_name.removesuffix(".weight"), Role.LM_HEAD)
    try:
        quantization = decode_json((folder / "config.json").read_bytes()).get("quantization", {})
        for file in sorted(folder.glob("model*.safetensors")):
            with safe_open(file, framework="numpy") as opened:
                entries = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
                found = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries.items()}
            for name in found:
                path, _, part = name.rpartition(".")
                if part == "weight":
                    parts = [found[f"{path}.{each}"] for each in ("weight", "scales", "biases") if f"{path}.{each}" in found]
                    yield _stored(name, roles.get(path), parts, quantization.get(path) or quantization)
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ElmExportError(f"{folder} does not hold an MLX model, or is damaged ({error}); export it again") from None


def _stored(name: str, role: Role | None, parts: list[tuple[str, tuple[int, ...]]], quantization: dict[str, Any]) -> StoredTensor:
    size = sum(_WIDTHS[dtype] * prod(shape) for dtype, shape in parts)
    dtype, shape = parts[0]
    if len(parts) == 1:
        return StoredTensor(name, role, {"F16": "float16", "BF16": "bfloat16"}.get(dtype, dtype), shape, size)
    bits, group = quantization["bits"], quantization["group_size"]
    scheme = f"{quantization.get('mode', 'affine')} {bits}-bit, groups of {group}"
    return StoredTensor(name, role, scheme, (*shape[:-1], shape[-1] * 32 // bits), size)
