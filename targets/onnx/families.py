"""Model types in an ONNX folder's `config.json`, of families that its readers do not list by their own name."""

from __future__ import annotations

from collections.abc import Mapping

# By model_type. transformers.js asks the type only which sizes of the cache stand under which keys: a family with the same keys serves.
ALIASES: Mapping[str, str] = {"olmoe": "olmo"}
