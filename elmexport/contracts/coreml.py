"""The interface of the Core ML packages that we export for the Neural Engine: names, functions, metadata keys.

Two functions, `prefill` (T tokens) and `decode` (one token).

| name | kind | type and shape |
|---|---|---|
| `input_ids` | input | int32 `[1, T]` |
| `position` | input | int32 `[1]`: place in the cache of the first token |
| `last_token` | input of `prefill` | int32 `[1]`: which of the T tokens the output follows |
| `key_cache`, `value_cache` | states, or inputs | fp16 `[1, KV heads of all layers, context, head_dim]` |
| `new_keys`, `new_values` | outputs, where the caches are inputs | fp16 `[1, KV heads of all layers, T, head_dim]` |
| `logits`; or its parts `logits_0`, `logits_1`, … | outputs | fp16 `[1, 1, vocab]`; parts join along the last axis |
| or `token`, `value` | outputs | int32, fp16 `[1, 1]` |

A model may be cut into packages that run one after another. The first has `input_ids`, the last `last_token`, the logits, or `token` and
`value`; each has the caches of its own layers. What one package gives as `hidden_out`, fp16 `[1, 1, T, model_dim]`, the next one takes as
`hidden`. Each package says in its metadata which one it is (`PackageIndex`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from elmexport.documents import decode_json

PREFILL, DECODE = "prefill", "decode"
INPUT_IDS, POSITION, LAST_TOKEN = "input_ids", "position", "last_token"
KEY_CACHE, VALUE_CACHE = "key_cache", "value_cache"
NEW_KEYS, NEW_VALUES = "new_keys", "new_values"
HIDDEN, HIDDEN_OUT = "hidden", "hidden_out"
LOGITS = "logits"
TOKEN, VALUE = "token", "value"

CACHE_OUTPUTS = {KEY_CACHE: NEW_KEYS, VALUE_CACHE: NEW_VALUES}  # what is written into each cache that is an input

METADATA_PREFIX = "elmexport."  # of every key that we write into a package's metadata
CHAIN_METADATA = f"{METADATA_PREFIX}chain"


@dataclass(frozen=True)
class Interface:
    """Variant of a package's interface.

    `prefill` is the number of tokens in one call of that function; `cache_io`: the cache is an input, and keys and values of the tokens given
    are outputs; otherwise states hold it. `argmax`: the most likely token instead of logits.
    """

    prefill: int
    cache_io: bool = False
    argmax: bool = False

    @property
    def functions(self) -> dict[str, int]:
        """The package's functions, and how many tokens each takes."""
        return {PREFILL: self.prefill, DECODE: 1}


def logits_names(parts: int) -> tuple[str, ...]:
    """Names of the outputs that, joined in this order, are the logits."""
    return (LOGITS,) if parts == 1 else tuple(f"{LOGITS}_{i}" for i in range(parts))


def is_logits(name: str) -> bool:
    """Whether an output is the logits, or a part of them."""
    return name == LOGITS or name.startswith(f"{LOGITS}_")


@dataclass(frozen=True)
class PackageIndex:
    """Place of a package among a model's packages, the JSON under `CHAIN_METADATA`.

    `{"index": 0, "files": ["a-1of2.mlpackage", …], "layers": [0, 9]}`: the files are all of them in the order in which they run, the layers
    the first and the last of this one.
    """

    index: int
    files: list[str]
    layers: list[int]

    @property
    def words(self) -> str:
        return f"package {self.index + 1} of {len(self.files)}"

    def to_metadata(self) -> dict[str, str]:
        """Entry of a package's metadata."""
        return {CHAIN_METADATA: json.dumps(asdict(self))}

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> PackageIndex | None:
        """Read what `to_metadata` wrote; None in the metadata of a package that is a whole model.

        Raises:
            ValueError, KeyError, TypeError: something else is written there.
        """
        found = decode_json(metadata.get(CHAIN_METADATA, "null"))
        if found is None:
            return None
        if not (isinstance(found["index"], int) and 0 <= found["index"] < len(found["files"])):
            raise ValueError("its index is none of its files'")
        return PackageIndex(found["index"], list(found["files"]), list(found["layers"]))
