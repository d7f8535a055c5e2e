"""Memory traffic of decoding: bytes read for one token, which are the weights as the file stores them and the KV cache so far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elmexport.artifact import MANIFEST, Artifact, StoredTensor
from elmexport.formats import find_format
from elmexport.graph.dims import ModelDims
from elmexport.inspection import list_tensors
from elmexport.manifest import Manifest
from elmexport.models import config_from_dict
from elmexport.weights import Role

_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes to read: `weight_bytes` for every token, `cache_bytes` (keys and values of all layers) for every token that the cache holds."""

    weight_bytes: int
    cache_bytes: int

    def per_token(self, depth: int, generate: int) -> float:
        """Bytes for one token, the mean of `generate` tokens decoded one by one after `depth` tokens; each reads its own keys, too."""
        return self.weight_bytes + self.cache_bytes * (depth + (generate + 1) / 2)


def traffic(path: Path) -> Traffic | None:
    """Memory traffic of the artifact folder `path`; None for a bare model file, whose tensors and configuration are not described.

    Raises:
        ElmExportError: a damaged manifest, or files that the format's reader cannot make sense of.
    """
    if not (path / MANIFEST).is_file():
        return None
    artifact = Artifact.open(path)
    dims = config_from_dict(artifact.manifest.model.config, where=str(path / MANIFEST)).dims
    return Traffic(_weights(list_tensors(artifact), dims), _cache(artifact.manifest, dims))


def _weights(tensors: tuple[StoredTensor, ...], dims: ModelDims) -> int:
    """Bytes that a token needs: all weights but an embedding that the head does not share, of which it needs a row; of experts, those it goes to."""
    total, layer = 0, dims.layers[0]
    for tensor in tensors:
        if tensor.role is not None and tensor.role.is_expert:
            total += tensor.bytes * layer.active_experts // layer.experts
        elif tensor.role is not None and (dims.tied or tensor.role is not Role.EMBEDDING):
            total += tensor.bytes
    return total


def _cache(manifest: Manifest, dims: ModelDims) -> int:
    width = find_format(manifest.target).cache_bytes or _WIDTHS[manifest.quant.activations]
    return 2 * sum(layer.kv_heads for layer in dims.layers) * dims.head_dim * width
