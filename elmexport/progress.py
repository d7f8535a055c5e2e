"""Progress of long work: stages with a known or unknown number of steps. Drawing it is the command line's business."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one command."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a new stage (and end the one before it): `total` steps of work, None where nobody knows."""

    def advance(self, n: int) -> None:
        """Report `n` more steps of the current stage."""

    def lend(self, name: str) -> bool:
        """Begin the last stage, whose progress a library draws itself; returns whether there is anybody to draw it for."""


class SilentProgress:
    """Progress that is shown to nobody."""

    def stage(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def lend(self, name: str) -> bool:
        return False
