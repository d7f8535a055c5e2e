"""Ranks and scales of a low-rank adapter, from the file beside it: PEFT's `adapter_config.json`, or the YAML file of a CoreNet run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmexport.documents import decode_json
from elmexport.errors import ElmExportError
from elmexport.models.base import check_positive

CONFIG = "adapter_config.json"
MERGE_FIX = "merge it with PEFT (merge_and_unload), save the result, and give --model that folder"

# Keys of PEFT's file that ask for more than a low-rank product; what they add would be left out without a word.
_UNSUPPORTED = (
    *("layer_replication", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "monteclora_config"),
    *("trainable_token_indices", "target_parameters", "megatron_config"),
)
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that take something out of the base


@dataclass(frozen=True)
class Scaling:
    """Scale of an update: `scale(module, rank)`, by the module's name in the adapter and the rank of its matrices."""

    scale: Callable[[str, int], float]
    dora: bool | None  # whether magnitudes belong to it; None: not known
    base: str | None = None  # the model that it says it was trained on
    note: str | None = None


def read_scaling(folder: Path) -> Scaling:
    """Read what lies in `folder` beside the adapter.

    Raises:
        ElmExportError: an unusable file, or a kind of adapter that is more than LoRA or DoRA.
    """
    if (folder / CONFIG).is_file():
        return _from_peft(folder / CONFIG)
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        found = _from_corenet(path)
        if found is not None:
            return found
    return Scaling(
        lambda module, rank: 1.0,
        None,
        note=f"nothing beside the adapter tells its scale; lora_alpha was taken to be the rank, as in CoreNet's own configurations. For another put "
        f'{CONFIG} beside it: {{"r": 32, "lora_alpha": 64}}',
    )


def adapter_base(folder: Path) -> str | None:
    """The model that `adapter_config.json` in `folder` names as the adapter's base; None where it names none."""
    try:
        base = decode_json((folder / CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) and base else None


def _from_peft(path: Path) -> Scaling:
    try:
        data = decode_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ElmExportError(f"{path}: not valid JSON ({error}); save the adapter again") from None
    if not isinstance(data, dict):
        raise ElmExportError(f"{path}: holds a JSON {type(data).__name__}, not an object; save the adapter again")
    kind = data.get("peft_type", "LORA")
    if kind != "LORA":
        raise ElmExportError(f"{path}: peft_type is {kind!r}; elmexport merges LORA (DoRA is one of its options): {MERGE_FIX}")
    used = [key for key in _UNSUPPORTED if data.get(key)]
    if used:
        raise ElmExportError(f"{path}: the adapter uses {used[0]}, which elmexport does not merge; {MERGE_FIX}")
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise ElmExportError(f"{path}: init_lora_weights is {start!r}, which changes the base too; {MERGE_FIX}")
    rank, alpha = _number(data, "r", path), _number(data, "lora_alpha", path)
    ranks, alphas = (_pattern(data, key, path) for key in ("rank_pattern", "alpha_pattern"))
    rank_stabilized = bool(data.get("use_rslora"))

    def scale(module: str, found: int) -> float:
        wanted = _matching(ranks, module, rank)
        if found != wanted:
            raise ElmExportError(f"{path} gives {module} the rank {wanted:g}, but its matrices have {found}; save the adapter again")
        return _matching(alphas, module, alpha) / (math.sqrt(found) if rank_stabilized else found)

    dora = data.get("use_dora")
    return Scaling(scale, dora if isinstance(dora, bool) else None, adapter_base(path.parent))


def _from_corenet(path: Path) -> Scaling | None:
    """The scales in CoreNet's YAML file `path` (`model.lora.config`, the first entry whose regex a module matches); None where it has none."""
    import yaml  # type: ignore[import-untyped]

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["lora"]["config"]
        found = [(re.compile(entry["regex"]), entry["params"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, re.error, yaml.YAMLError):
        return None

    def scale(module: str, rank: int) -> float:
        params = next((params for regex, params in found if regex.match(module)), None)
        if params is None:
            raise ElmExportError(f"{path}: no regex under model.lora.config matches {module}, which the adapter changes; give its own file")
        if params.get("r") != rank:
            raise ElmExportError(
                f"{path} gives {module} the rank {params.get('r')}, but its matrices have {rank}; give the adapter's own file"
            )
        return float(_number(params, "lora_alpha", path) / (math.sqrt(rank) if params.get("use_rslora") else rank))

    return Scaling(scale, None)


def _number(data: Mapping[str, Any], key: str, path: Path) -> float:
    value: Any = data.get(key)
    check_positive(value, key, str(path))
    return float(value)


def _pattern(data: Mapping[str, Any], key: str, path: Path) -> dict[str, float]:
    patterns = data.get(key) or {}
    if not isinstance(patterns, dict):
        raise ElmExportError(f"{path}: {key} is {patterns!r}; it must be an object of numbers by module")
    return {pattern: _number(patterns, pattern, path) for pattern in patterns}


def _matching(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """The value of the first pattern that `module` matches, as PEFT looks it up: a regular expression at the end of the name."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)
