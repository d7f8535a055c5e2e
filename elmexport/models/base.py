"""Contract of a model family: its configuration class, and the row by which the registry knows it.

No torch in here: listing models must be instant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from elmexport.errors import ElmExportError
from elmexport.graph.dims import ModelDims
from elmexport.weights import WeightSpec

if TYPE_CHECKING:
    from torch import nn


# Beyond any model's, and small enough for what is computed of them: a damaged file must not ask for a billion layers.
LARGEST_SIZE, MOST_LAYERS, LONGEST_CONTEXT, LARGEST_NUMBER = 1 << 24, 1000, 1 << 20, 1e30


def check_size(value: object, key: str, where: str, largest: int = LARGEST_SIZE) -> None:
    """Check a size that `key` of the file `where` gives.

    Raises:
        ElmExportError: no whole number from 1 to `largest`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ElmExportError(f"{where}: {key} is {value!r}; it must be a whole number above 0")
    if value > largest:
        raise ElmExportError(f"{where}: {key} is {value}; it must be at most {largest}")


def check_positive(value: Any, key: str, where: str) -> None:
    """Check a real number that `key` of the file `where` gives.

    Raises:
        ElmExportError: no number above 0 that float32, in which formats store it, can hold.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ElmExportError(f"{where}: {key} is {value!r}; it must be a number above 0")
    if value > LARGEST_NUMBER:
        raise ElmExportError(f"{where}: {key} is {value!r}; it must be at most {LARGEST_NUMBER:g}")


class ModelConfig(ABC):
    """Configuration of one model: what its `config.json` says.

    Subclasses are frozen dataclasses; `dims` is a cached property of theirs.
    """

    model_type: ClassVar[str]  # of config.json
    name_prefix: ClassVar[str]  # what all weight names begin with, left out of node names: "transformer."
    head_name: ClassVar[str]  # of an LM head's tensor, also of one that a tied model stores all the same
    tied_key: ClassVar[str]  # key of config.json that says whether the LM head is the embedding's table
    bos_token_id: int | None  # None: texts have no beginning of their own
    eos_token_ids: tuple[int, ...]  # each of them ends a text; the usual one first

    @classmethod
    @abstractmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "config.json") -> Self:
        """Read the family's keys of a `config.json`; `where` names the file in errors.

        Raises:
            ElmExportError: a missing or unusable value, or a model that the family's module does not cover.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The family's `config.json`, as its published models have it."""

    @property
    @abstractmethod
    def dims(self) -> ModelDims:
        """Sizes of the model."""

    @abstractmethod
    def weights(self) -> Iterator[WeightSpec]:
        """Every tensor of the model, in the order in which a forward pass first uses them."""

    @abstractmethod
    def module(self) -> nn.Module:
        """The forward pass in the op vocabulary (`elmexport.graph.ops`).

        `module(ids, position, k_caches, v_caches)` returns logits and the updated caches; parameters go by the names of `weights`.
        """

    @property
    def eos_token_id(self) -> int:
        """The usual one of `eos_token_ids`."""
        return self.eos_token_ids[0]

    @property
    def parameter_count(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(spec.size for spec in self.weights())


@dataclass(frozen=True)
class KnownModel:
    """A model that `--model` takes by alias."""

    alias: str  # "1.1B-Instruct", as `elmexport models` prints it
    name: str  # display name, used in file names
    hub_id: str | None  # "owner/name"; None for one that is embedded
    config: ModelConfig
    folder: Path | None = None  # of the weights that come with elmexport
    license: str | None = None  # of the weights, as the hub calls it

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return self.config.parameter_count


@dataclass(frozen=True)
class Family:
    """One row of the registry: a model family, and everything about it that is no op, weight or dimension."""

    name: str  # as messages and pages call it
    config: type[ModelConfig]
    known_models: Callable[[], tuple[KnownModel, ...]]
    tokenizer_words: str  # "the Llama 2 tokenizer"
    tokenizer_repo: str | None  # hub repository of the tokenizer, for checkpoints that come without one
    published: Traversable | None = None  # TOML file of published evaluation figures, see `elmexport.evaluation.tasks.presets`
    trained_name: Callable[[str], str] | None = None  # a tensor's name in the files of the family's own training code, to that of `weights`
