"""How long work reports on itself: stages with a known or unknown number of steps. Drawing it is the command line's business."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one command."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins (and the one before it has ended): `total` steps of work, None where nobody knows."""

    def advance(self, n: int) -> None:
        """`n` more steps of the current stage are done."""


class SilentProgress:
    """Says nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, n: int) -> None:
        pass
