"""Model families by `model_type`, found lazily; the models that `--model` knows by name; configurations from `config.json`.

A family is one package with a `Family` row called `FAMILY`. Nothing outside it knows its names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmexport.documents import decode_json
from elmexport.errors import ElmExportError
from elmexport.models.base import Family, KnownModel, ModelConfig

if TYPE_CHECKING:
    from elmexport.graph.ir import Graph

# By the model_type of config.json; a file without one is read as the first.
FAMILIES: Mapping[str, str] = {
    "openelm": "elmexport.models.openelm:FAMILY",
    "olmoe": "elmexport.models.olmoe:FAMILY",
}


@cache
def find_family(model_type: str) -> Family:
    """The family whose configurations say `model_type`.

    Raises:
        ElmExportError: none does.
    """
    if model_type not in FAMILIES:
        raise ElmExportError(f"model_type is {model_type!r}; elmexport exports {' and '.join(map(repr, FAMILIES))} models")
    module, _, attribute = FAMILIES[model_type].partition(":")
    family: Family = getattr(import_module(module), attribute)
    return family


def families() -> Iterator[Family]:
    """Every family, in the order of the registry."""
    return map(find_family, FAMILIES)


def known_models() -> list[KnownModel]:
    """The models that `--model` takes by alias: the embedded ones, then the published ones, family by family."""
    return sorted((model for family in families() for model in family.known_models()), key=lambda model: model.folder is None)


def find_model(alias: str) -> KnownModel | None:
    """The model that `alias` names, by alias, display name or hub id in any spelling (`1.1B`, `1_1b`); None where there is none."""
    wanted = _normal(alias)
    return next(
        (model for model in known_models() if wanted in {_normal(name) for name in (model.alias, model.name, model.hub_id or "")}), None
    )


def _normal(alias: str) -> str:
    return alias.casefold().replace("_", ".")


def config_from_dict(data: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """The configuration in a `config.json`'s object, of the family that its `model_type` names.

    Raises:
        ElmExportError: an unknown model type, or see `ModelConfig.from_dict`.
    """
    model_type = data.get("model_type", next(iter(FAMILIES)))
    try:
        family = find_family(str(model_type))
    except ElmExportError as error:
        raise ElmExportError(f"{where}: {error}") from None
    return family.config.from_dict(data, where=where)


def read_config(path: Path) -> ModelConfig:
    """The configuration in the file `path`, a `config.json`; a `generation_config.json` beside it may name more tokens that end a text.

    Raises:
        ElmExportError: no such file, not JSON, or see `config_from_dict`.
    """
    data = _read_object(path)
    if data is None:
        raise ElmExportError(f"{path}: no such file; a checkpoint folder holds config.json beside its weights")
    generation = _read_object(path.with_name("generation_config.json")) or {}
    ends = [*_as_list(data.get("eos_token_id")), *_as_list(generation.get("eos_token_id"))]
    if len(set(map(repr, ends))) > 1:
        data["eos_token_id"] = list({repr(end): end for end in ends}.values())
    elif ends and data.get("eos_token_id") is None:
        data["eos_token_id"] = ends[0]
    return config_from_dict(data, where=str(path))


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where there is no such file."""
    try:
        data = decode_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ElmExportError(f"{path}: not valid JSON ({error}); download the file again") from None
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}; check the file and its permissions") from None
    if not isinstance(data, dict):
        raise ElmExportError(f"{path}: holds a JSON {type(data).__name__}, not an object; download the file again")
    return data


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def trace(config: ModelConfig, context: int | None = None) -> Graph:
    """The graph of one forward pass of a model over a KV cache of `context` tokens (the context it was trained on where None).

    A graph does not change, so equal configurations share one: calibration, reference pass and export of a model ask for it in turn.

    Raises:
        ElmExportError: `context` is not in 1 … `dims.max_context`.
    """
    return _trace(config, config.dims.context if context is None else context)


@lru_cache(maxsize=16)
def _trace(config: ModelConfig, context: int) -> Graph:
    from elmexport.graph.trace import trace_module

    return trace_module(config.module, config.dims, config.weights(), context, prefix=config.name_prefix)
