"""Contract of a target, the writer of one format's files. `elmexport.formats` says which there are.

A target is one package with a lowering from the traced graph, packing of weights, and recipes as data.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from elmexport.artifact import file_sha256
from elmexport.errors import ElmExportError
from elmexport.formats import FORMATS, find_format, load
from elmexport.manifest import Chain, FileSetting, Setting
from elmexport.quantization.recipes import Plan, Recipe, load_recipe
from elmexport.quantization.schemes import Float, Scheme
from elmexport.weights import Role

if TYPE_CHECKING:  # a target's class is imported for its --help, which nothing heavy may delay
    import numpy as np
    from numpy.typing import NDArray

    from elmexport.checkpoint.tokenizer import Tokenizer
    from elmexport.graph.ir import Graph
    from elmexport.models.base import ModelConfig
    from elmexport.quantization.weight_source import WeightSource

Advance = Callable[[int], None]


@dataclass(frozen=True)
class ExportJob:
    """Everything a target needs to write its files.

    `graph` already carries the residual rescaling. `advance(n)` reports that n more weights (elements) have been written.
    """

    name: str  # display name, for file names
    config: ModelConfig
    graph: Graph
    weights: WeightSource
    tokenizer: Tokenizer | None
    advance: Advance

    @property
    def recipe(self) -> Recipe:
        return self.weights.plan.recipe

    @property
    def special_ids(self) -> dict[str, int | list[int]]:
        """Ids of the tokens that begin, end and pad texts, under the names of generation_config.json."""
        special = None if self.tokenizer is None else self.tokenizer.special
        bos, eos = (self.config.bos_token_id, self.config.eos_token_ids) if special is None else (special.bos, special.eos)
        pad = None if special is None else special.pad
        ids: dict[str, int | list[int]] = {} if bos is None else {"bos_token_id": bos}
        return {**ids, "eos_token_id": eos[0] if len(eos) == 1 else list(eos), "pad_token_id": eos[0] if pad is None else pad}

    def write_description(self, folder: Path, model_type: str | None = None) -> None:
        """Write `config.json` and the tokenizer's files into `folder`, for formats that do not carry them inside.

        `model_type` stands there instead of the family's own.
        """
        data = self.config.to_dict() | ({} if model_type is None else {"model_type": model_type})
        (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        if self.tokenizer is not None:
            from elmexport.checkpoint.tokenizer.clients import write_tokenizer_files

            write_tokenizer_files(self.tokenizer, self.graph.context, folder)


@dataclass(frozen=True)
class Written:
    """Result of writing files: the chain in which they run, where there is one, and notes for the user."""

    chain: Chain | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """Self-check's token ids `[tokens]`, and the logits `[tokens, vocab]` of the model (float32) and of the artifact."""

    ids: NDArray[np.int64]
    model: NDArray[np.float32]
    artifact: NDArray[np.float32]
    context: int  # tokens that the artifact's cache holds


@dataclass(frozen=True)
class Option:
    """Command-line option of one field of a target."""

    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None  # the values that it may have


def option(help: str, *, metavar: str | None = None, choices: tuple[str, ...] | None = None) -> Mapping[str, Option]:
    """Make a field of a target an option of its command: `field(default="a", metadata=option("What it does.", choices=("a", "b")))`."""
    return {"option": Option(help, metavar, choices)}


def options(kind: type[Target]) -> Mapping[str, Option]:
    """Command-line options of the target `kind`, by field."""
    if not is_dataclass(kind):
        return {}
    return {field.name: field.metadata["option"] for field in fields(kind) if "option" in field.metadata}


@dataclass(frozen=True)
class Usage:
    """Usage of an artifact in one program, for its model card: commands or code, run in the artifact's folder."""

    program: str
    code: str
    language: str = "bash"


class Target(ABC):
    """One output format.

    A target that has settings of its own is a frozen dataclass: each field is one setting, with a default. Those with `option` among their
    metadata are options of the target's command.
    """

    name: ClassVar[str]
    quants: ClassVar[tuple[str, ...]]  # the values of --quant, the default first
    quants_note: ClassVar[str] = ""  # a sentence below their list in the command's help
    example: ClassVar[str] = "--model tiny"  # the command's options in its help's example

    def recipe(self, quant: str) -> Recipe:
        """The recipe called `quant`, read from the `recipes/` folder of the target's package.

        Raises:
            ElmExportError: the format has no such quantization.
        """
        if quant not in self.quants:
            raise ElmExportError(f"--quant {quant} is not available for {self.name}; choose {', '.join(self.quants)}")
        return self.adapt(self.stored_recipe(quant))

    def stored_recipe(self, quant: str) -> Recipe:
        """The recipe `quant`, one of `quants`, as it lies in the `recipes/` folder of the target's package."""
        package = import_module(type(self).__module__).__package__
        assert package is not None
        return load_recipe(files(package).joinpath("recipes", f"{quant}.toml"))

    def adapt(self, recipe: Recipe) -> Recipe:
        """Adapt `recipe`, the target's own or a user's, to the target's settings.

        Raises:
            ElmExportError: settings that have no use with it.
            MissingDependencyError: it needs something that is not installed.
        """
        return recipe.given(imatrix=False)

    def refuses(self, scheme: Scheme, role: Role) -> str | None:
        """Reason why files of the format cannot hold a tensor of `role` in `scheme`, as the end of a sentence that begins with its name.

        None if they can. Recipes that a user wrote are checked with it before any work.
        """
        return None

    @abstractmethod
    def check(self, config: ModelConfig, context: int) -> None:
        """Refuse, before any work, a model or context that the format cannot express.

        Raises:
            ElmExportError: what the format cannot hold, and what to do instead.
        """

    def check_tokenizer(self, tokenizer: Tokenizer) -> Sequence[str]:
        """Refuse, before any work, a tokenizer that the artifact cannot carry with the same ids; return what is worth a note.

        Here: of a format with `tokenizer.json` beside the model.

        Raises:
            ElmExportError: what the format has no form for, and what to do instead.
        """
        from elmexport.checkpoint.tokenizer.clients import client_notes

        return client_notes(tokenizer)

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

    def usage(self, files: Sequence[str]) -> Sequence[Usage]:
        """List the ways to run an artifact that holds `files` in other programs than elmexport."""
        return ()

    def settings(self) -> dict[str, Setting]:
        """The target's settings for the manifest: plain values, and of a file its name and hash."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)} if is_dataclass(self) else {}
        return {name: FileSetting(value.name, file_sha256(value)) if isinstance(value, Path) else value for name, value in found.items()}

    def tools(self) -> Mapping[str, str]:
        """Names and versions of the packages that shaped the files, for the manifest."""
        return {}


def find_target(name: str, settings: Mapping[str, Any] | None = None) -> Target:
    """Make the target of the format `name`, with its own settings where they differ from the defaults.

    Raises:
        ElmExportError: no such format, or a setting that its target does not have.
    """
    kind: type[Target] = load(find_format(name, "target").target)
    given = dict(settings or {})
    allowed: list[str] = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    unknown = [setting for setting in given if setting not in allowed]
    if unknown:
        raise ElmExportError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(allowed) or 'none'}")
    for setting, described in options(kind).items():
        if setting in given and described.choices is not None and given[setting] not in described.choices:
            raise ElmExportError(f"--{setting.replace('_', '-')} is {given[setting]!r}; choose {' or '.join(described.choices)}")
    return kind(**given)


def wider_formats(target: Target) -> str:
    """Advice for numbers that fp16 cannot hold: quantizations of `target`'s format that can, or else those of other formats."""
    own = _wide(target)
    if own:
        return f"choose --quant {' or '.join(own)}"
    others = [f"`elmexport {row.name} --quant {wide[-1]}`" for row in FORMATS.values() if (wide := _wide(load(row.target)()))]
    return f"{target.name} files hold and compute fp16 whatever the --quant: correct the row in the checkpoint, or export with {' or '.join(others)}"


def _wide(target: Target) -> list[str]:
    """The quantizations of a format that keep and compute everything in bf16 or fp32."""
    found = []
    for quant in target.quants:
        recipe = target.stored_recipe(quant)
        dtypes = {recipe.activations.dtype, *(rule.scheme.dtype if isinstance(rule.scheme, Float) else "fp16" for rule in recipe.rules)}
        if "fp16" not in dtypes:
            found.append(quant)
    return found
