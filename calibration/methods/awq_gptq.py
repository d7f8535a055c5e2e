"""AWQ, then GPTQ: the codes of the rescaled model are found by GPTQ."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from calibration.methods.awq import fold
from calibration.methods.base import Job
from calibration.methods.gptq import GPTQ

if TYPE_CHECKING:
    from calibration.folding import FoldedCheckpoint


class AWQGPTQ(GPTQ):
    name = "awq+gptq"
    words = "both"

    def _fold(self, job: Job) -> Callable[[], FoldedCheckpoint]:
        return partial(fold, job)
