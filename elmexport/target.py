"""The contract of a target (an output format) and the registry of those that exist.

A target is one package with a lowering from the traced graph, packing of weights, and recipes as data. Third parties add one through
the entry-point group `elmexport.targets`.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from elmexport.artifact import file_sha256
from elmexport.checkpoint.tokenizer import Tokenizer
from elmexport.errors import ElmExportError
from elmexport.graph.ir import Graph
from elmexport.models.base import ModelConfig
from elmexport.quantization.recipes import Plan, Recipe, load_recipe
from elmexport.quantization.schemes import Scheme
from elmexport.quantization.weight_source import WeightSource
from elmexport.weights import Role

TARGETS: Mapping[str, str] = {
    "onnx": "targets.onnx:OnnxTarget",
    "coreml": "targets.coreml:CoreMLTarget",
    "gguf": "targets.gguf:GgufTarget",
}
ENTRY_POINT_GROUP = "elmexport.targets"

Advance = Callable[[int], None]


@dataclass(frozen=True)
class ExportJob:
    """Everything a target needs to write its files.

    `graph` already carries the residual rescaling. `advance(n)` reports that n more weights (elements) have been written.
    """

    name: str  # display name for file names, "OpenELM-450M"
    config: ModelConfig
    graph: Graph
    weights: WeightSource
    tokenizer: Tokenizer | None
    advance: Advance

    @property
    def recipe(self) -> Recipe:
        return self.weights.plan.recipe

    def write_description(self, folder: Path) -> None:
        """Write `config.json` and the tokenizer's file into `folder`, for formats that do not carry them inside."""
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        if self.tokenizer is not None:
            shutil.copyfile(self.tokenizer.path, folder / self.tokenizer.file_name)


@dataclass(frozen=True)
class Written:
    """What should be known of files just written: entries for the manifest beside its own, and notes for the user."""

    manifest: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """What the self-check read: token ids `[tokens]`, and the logits `[tokens, vocab]` of the model (float32) and of the artifact."""

    ids: NDArray[np.int64]
    model: NDArray[np.float32]
    artifact: NDArray[np.float32]
    context: int  # tokens that the artifact's cache holds


class Target(ABC):
    """One output format.

    A target that has settings of its own is a frozen dataclass: each field is one setting, with a default. The command line offers
    them as options of the target's command (`elmexport.cli.target_options`).
    """

    name: ClassVar[str]
    quants: ClassVar[tuple[str, ...]]  # the values of --quant, the default first

    def recipe(self, quant: str) -> Recipe:
        """The recipe called `quant`, read from the `recipes/` folder of the target's package.

        Raises:
            ElmExportError: the format has no such quantization.
        """
        if quant not in self.quants:
            raise ElmExportError(f"--quant {quant} is not available for {self.name}; choose {', '.join(self.quants)}")
        return self.adapt(load_recipe(files(type(self).__module__).joinpath("recipes", f"{quant}.toml")))

    def adapt(self, recipe: Recipe) -> Recipe:
        """`recipe`, the target's own or a user's, as the target's settings leave it.

        Raises:
            ElmExportError: settings that have no use with it.
            MissingDependencyError: it needs something that is not installed.
        """
        return recipe.given(imatrix=False)

    def refuses(self, scheme: Scheme, role: Role) -> str | None:
        """Why files of the format cannot hold a tensor of `role` in `scheme`, as the end of a sentence that begins with the format's name.

        None if they can. Recipes that a user wrote are checked with it before any work.
        """
        return None

    @abstractmethod
    def check(self, config: ModelConfig, context: int) -> None:
        """Refuse, before any work, a model or context that the format cannot express.

        Raises:
            ElmExportError: what the format cannot hold, and what to do instead.
        """

    def check_plan(self, graph: Graph, plan: Plan) -> None:  # noqa: B027  (optional: most formats hold any sizes)
        """Refuse, before any work, tensors whose stored sizes the target's files cannot hold.

        Raises:
            ElmExportError: what is too large, and what to do instead.
        """

    @abstractmethod
    def write(self, job: ExportJob, folder: Path) -> Written | None:
        """Write the artifact's files into `folder` (which exists and is empty), weights streamed one tensor at a time."""

    def finish(self, folder: Path, checked: Checked) -> None:  # noqa: B027  (optional: most formats need no more)
        """Add to the artifact what comes of the self-check, after it has passed."""

    def settings(self) -> dict[str, Any]:
        """The target's settings for the manifest: plain values, and of a file its name and hash."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)} if is_dataclass(self) else {}
        return {
            name: {"file": value.name, "sha256": file_sha256(value)} if isinstance(value, Path) else value for name, value in found.items()
        }

    def tools(self) -> Mapping[str, str]:
        """Names and versions of the packages that shaped the files, for the manifest."""
        return {}


def find_target(name: str, settings: Mapping[str, Any] | None = None) -> Target:
    """The target called `name`, with its own settings where they differ from the defaults.

    Raises:
        ElmExportError: no such target, or a setting that it does not have.
    """
    known = dict(TARGETS) | {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in TARGETS}
    if name not in known:
        raise ElmExportError(f"unknown target {name!r}; known: {', '.join(known)}")
    module, _, attribute = known[name].partition(":")
    kind: type[Target] = getattr(import_module(module), attribute)
    given = dict(settings or {})
    allowed: list[str] = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    unknown = [setting for setting in given if setting not in allowed]
    if unknown:
        raise ElmExportError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(allowed) or 'none'}")
    return kind(**given)
