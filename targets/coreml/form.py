"""Contract of a form of Core ML packages: what is different between those for the Neural Engine and those for GPUs. No coremltools."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import ClassVar

from elmexport import __version__
from elmexport.contracts.coreml import METADATA_PREFIX
from elmexport.errors import ElmExportError
from elmexport.graph.dims import ModelDims
from elmexport.graph.ir import Graph
from elmexport.quantization.recipes import Plan
from elmexport.target import ExportJob, Written
from targets.coreml.chunks import MEGABYTE
from targets.coreml.interface import CONTEXT_MULTIPLE


@dataclass(frozen=True)
class Form(ABC):
    """One form, with the target's settings (see `CoreMLTarget`): its checks, recipes, limits and the writing of packages."""

    kv: str
    prefill: int | None
    argmax: bool
    max_package_mb: float | None

    default_max_package_mb: ClassVar[float]

    @property
    def max_package_bytes(self) -> float:
        """Limit of one package's weights, in bytes."""
        return MEGABYTE * (self.default_max_package_mb if self.max_package_mb is None else self.max_package_mb)

    def recipe_file(self, quant: str) -> Traversable | None:
        """The form's own recipe `quant`; None where it has the one that all forms share."""
        found = files(type(self).__module__.rpartition(".")[0]).joinpath("recipes", f"{quant}.toml")
        return found if found.is_file() else None

    def check(self, dims: ModelDims, context: int) -> None:
        """Refuse settings, contexts and models that the form cannot express.

        Raises:
            ElmExportError: what is refused, and what to do instead.
        """
        self.check_settings()
        _check_cache(dims, context)
        self.check_sizes(dims, context)

    def check_settings(self) -> None:  # noqa: B027  (optional: a form may take all)
        """Refuse settings that have no use with the form.

        Raises:
            ElmExportError: which one.
        """

    def check_sizes(self, dims: ModelDims, context: int) -> None:  # noqa: B027  (optional: GPUs have no such limits)
        """Refuse dimensions that the unit does not take.

        Raises:
            ElmExportError: which one, and what to do instead.
        """

    @abstractmethod
    def check_plan(self, graph: Graph, plan: Plan) -> None:
        """Refuse weights that are too large for one package and cannot be cut.

        Raises:
            ElmExportError: how large they are, and what to do instead.
        """

    @abstractmethod
    def prompt_tokens(self, context: int) -> int:
        """Tokens of a prompt that are read in one call."""

    @abstractmethod
    def write(self, job: ExportJob, folder: Path) -> Written | None:
        """Write the package or packages, and the files beside them, into `folder`."""


def _check_cache(dims: ModelDims, context: int) -> None:
    if context % CONTEXT_MULTIPLE:
        below = min(context, dims.max_context) // CONTEXT_MULTIPLE * CONTEXT_MULTIPLE
        above = below + CONTEXT_MULTIPLE
        allowed = [str(value) for value in (below, above) if 0 < value <= dims.max_context]
        raise ElmExportError(
            f"context is {context}; the cache of a Core ML model must hold a multiple of {CONTEXT_MULTIPLE} tokens: "
            f"pass --context {' or '.join(allowed) or CONTEXT_MULTIPLE}"
        )
    if dims.head_dim % CONTEXT_MULTIPLE:
        raise ElmExportError(
            f"head_dim is {dims.head_dim}; the cache of a Core ML model takes multiples of {CONTEXT_MULTIPLE}: export this model to onnx or gguf"
        )


def package_metadata(job: ExportJob) -> dict[str, str]:
    """Metadata of every package: what it says of its model, under `elmexport.…` keys."""
    alpha = next(node.weight_scale for node in job.graph.nodes if node.op == "embed")
    return own_metadata(
        {
            "version": __version__,
            "model": job.name,
            "config": json.dumps(job.config.to_dict()),
            "quant": job.recipe.name,
            "quant_words": job.recipe.words,
            "context": str(job.graph.context),
            "alpha": repr(alpha),
        }
    )


def own_metadata(facts: dict[str, str]) -> dict[str, str]:
    """Put `facts` under keys of ours."""
    return {f"{METADATA_PREFIX}{key}": value for key, value in facts.items()}


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise OSError where coremltools' weight writer finds the disk full, of which it tells by a RuntimeError without an errno."""
    try:
        yield
    except RuntimeError as error:
        if "[MIL FileWriter]" not in str(error):
            raise
        raise OSError("the weight file could not be written") from error
