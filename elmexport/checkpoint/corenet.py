"""Configuration of a `.pt` file: CoreNet, Apple's training code, writes none that is read here.

`config.json` beside the file, or the shapes of its tensors, say which model it is; CoreNet's YAML file does not describe one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from elmexport.checkpoint.names import find_names
from elmexport.checkpoint.stored import is_padded
from elmexport.errors import ElmExportError
from elmexport.models import families, find_family, read_config
from elmexport.models.base import Family, ModelConfig
from elmexport.weights import Role

Shapes = Mapping[str, tuple[int, ...]]


def find_config(path: Path, shapes: Shapes) -> ModelConfig:
    """The configuration in `config.json` beside `path`, or else that of the known model whose tensors `shapes` (by stored name) are.

    Raises:
        ElmExportError: no file, and no model fits; or a family that has no `.pt` files.
    """
    beside = path.parent / "config.json"
    candidates = [family for family in families() if family.trained_name is not None]
    if beside.is_file():
        config = read_config(beside)
        family = find_family(config.model_type)
        if family.trained_name is None:
            raise ElmExportError(f"{path}: {family.name} models are not read from `.pt` files; give --model a folder with safetensors")
        return config
    for family in candidates:
        for model in family.known_models():
            if fits(model.config, family_shapes(shapes, model.config, family)):
                return model.config
    names = ", ".join(dict.fromkeys(model.name.removesuffix("-Instruct") for family in candidates for model in family.known_models()))
    raise ElmExportError(
        f"{path}: its tensors do not fit any known model ({names}); put the model's config.json (the fields of the published ones) beside the file"
    )


def family_shapes(shapes: Shapes, config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """`shapes` by the family's names, without tensors that have none."""
    wanted = {spec.name for spec in config.weights()}
    return {name: shapes[stored] for name, stored in find_names(shapes, wanted, family.trained_name).stored.items()}


def fits(config: ModelConfig, shapes: Shapes) -> bool:
    """Whether the tensors in `shapes` are exactly those of `config`, but for rows that pad the vocabulary."""
    specs = list(config.weights())
    return {spec.name for spec in specs} == set(shapes) and all(
        shapes[spec.name] == spec.shape or (spec.role in (Role.EMBEDDING, Role.LM_HEAD) and _is_padded(shapes[spec.name], spec.shape))
        for spec in specs
    )


def _is_padded(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and found[1:] == wanted[1:] and is_padded(found[0], wanted[0])
