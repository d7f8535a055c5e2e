"""The contract of a method, which finds the codes of a model's weights. A method is a module in `calibration.methods`, and a row there.

Nothing heavy is imported here: the command line asks every method for its words.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from calibration.inputs import Inputs
    from calibration.statistics import Statistics
    from elmexport.checkpoint.base import Checkpoint
    from elmexport.progress import Progress
    from elmexport.quantization.recipes import Plan
    from elmexport.quantization.weight_source import WeightSource


@dataclass(frozen=True)
class Job:
    """Work for a method: a model, the schemes of its tensors, and what there is to calibrate with."""

    checkpoint: Checkpoint
    plan: Plan
    inputs: Inputs
    progress: Progress
    short_pass: Callable[[], Statistics] | None = None  # statistics of a few tokens, which cost little; None where they are not wanted
    minutes: float = math.inf  # that a method which chooses by time may take


@dataclass(frozen=True)
class Prepared:
    """Prepared weights of an export, ready to be written, and what is known of them."""

    weights: WeightSource
    statistics: Statistics | None  # of the model's activations, where they were measured or given
    facts: Mapping[str, Any]  # for the manifest's `quant`
    notes: tuple[str, ...] = ()  # what the user should know that is not an error

    @property
    def plan(self) -> Plan:
        return self.weights.plan


class Method(ABC):
    """Method of quantization."""

    name: ClassVar[str]
    words: ClassVar[str]  # for --help: what it does, what it takes
    needs_text: ClassVar[bool] = False  # or statistics: it cannot do without
    measures_statistics: ClassVar[bool] = False  # of a text, where that is what it is given
    takes_statistics: ClassVar[bool] = True  # in the place of a text
    makes_weight_set: ClassVar[bool] = False  # its codes are kept in a file, which other formats can take

    @abstractmethod
    def prepare(self, job: Job) -> Prepared:
        """Find the codes, or the source that finds them when they are written.

        Raises:
            ElmExportError: inputs that do not serve, or weights that do not fit their scheme.
        """
