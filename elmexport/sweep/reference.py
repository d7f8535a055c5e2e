"""Process that evaluates the fp16 reference of a model into the cache: `python -m elmexport.sweep.reference DOCUMENT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from elmexport.errors import ElmExportError
from elmexport.evaluation.evaluate import Settings, evaluate_reference
from elmexport.progress import SilentProgress
from elmexport.sweep.models import open_model_checkpoint
from elmexport.sweep.plan import ModelChoice


class ReferenceRun(Struct, frozen=True):
    """A reference to evaluate, once with each of `settings`."""

    model: ModelChoice
    context: int
    settings: tuple[Settings, ...]

    def to_json(self) -> str:
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def from_json(cls, text: str) -> ReferenceRun:
        return msgspec.json.decode(text, type=cls, dec_hook=_path)


def _path(kind: type, value: Any) -> Any:
    assert kind is Path, kind
    return Path(value)


def main() -> None:
    """Evaluate the reference that the argument describes."""
    run = ReferenceRun.from_json(sys.argv[1])
    try:
        checkpoint = open_model_checkpoint(run.model, SilentProgress())
        for settings in run.settings:
            evaluate_reference(checkpoint, run.context, settings)
    except ElmExportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
