"""Front door of the package: `elmexport.export`, `elmexport.open`, `elmexport.evaluate`.

The package loads this module when one of them is first used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calibration.methods import DEFAULT
from calibration.options import WeightOptions
from elmexport.evaluation.evaluate import Settings
from elmexport.evaluation.evaluate import evaluate as evaluate_with
from elmexport.evaluation.results import Report
from elmexport.evaluation.tasks.presets import chosen_tasks
from elmexport.evaluation.tasks.suite import check_names
from elmexport.exporting import ExportResult
from elmexport.exporting import export as export_model
from elmexport.runtimes.base import TokenIds
from elmexport.runtimes.sampler import Sampling
from elmexport.runtimes.text import Completion, TextModel, TextOptions, open_text_model


def export(
    model: str = "tiny",
    target: str = "onnx",
    quant: str | None = None,
    *,
    out: str | Path | None = None,
    method: str = DEFAULT,
    calibrate: Literal["auto", "none"] | Path = "auto",
    context: int | None = None,
    tokenizer: str | None = None,
    settings: Mapping[str, Any] | None = None,
    verify: bool = True,
    force: bool = False,
) -> ExportResult:
    """Export a model, as `elmexport TARGET --model MODEL --quant QUANT` does: `path` and `manifest` of the result are the artifact's.

    `settings` are the target's own options, by name: `{"device": "gpu"}`.

    Raises:
        ElmExportError: bad input, or something that the target cannot express; nothing is left behind.
        VerificationError: the artifact is far from the model; it has been discarded.
    """
    return export_model(
        model,
        target,
        quant,
        out=None if out is None else Path(out),
        context=context,
        weights=WeightOptions(method, calibrate),
        tokenizer=tokenizer,
        settings=settings,
        verify=verify,
        force=force,
    )


class OpenArtifact:
    """An artifact that is open in the engine that runs it, with its tokenizer. A `with` block closes it."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    @property
    def context(self) -> int:
        """Tokens that prompt and answer can have together."""
        return self._model.runtime.context

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        prompt_lookup: int | None = None,
    ) -> str:
        """Continue `prompt`, and return what follows it; options are `elmexport generate`'s.

        Raises:
            ElmExportError: a value out of range, or a prompt that is too long for the context.
        """
        sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty)
        return self.complete(prompt, TextOptions(max_tokens, sampling, tuple(stop), prompt_lookup)).text

    def complete(self, prompt: str, options: TextOptions) -> Completion:
        """Continue `prompt`; the result says how it ended and how fast it was, too."""
        return self._model.complete(prompt, options)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, after the token that begins texts."""
        return self._model.tokenizer.encode(text)

    def logits(self, ids: TokenIds, position: int = 0) -> NDArray[np.float32]:
        """Logits `[tokens, vocab]` of `ids` at `position` of the KV cache; see `elmexport.runtimes.base.Runtime.logits`."""
        return self._model.runtime.logits(ids, position)

    def close(self) -> None:
        """Release the engine's memory."""
        self._model.close()

    def __enter__(self) -> OpenArtifact:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open(path: str | Path, *, tokenizer: str | Path | None = None, draft_model: str | Path | None = None) -> OpenArtifact:
    """Open an artifact folder, a bare model file, or a checkpoint folder, to generate with it.

    `draft_model` guesses tokens for it: an artifact too, or a model as `export` takes it, "tiny" or a hub id.

    Raises:
        ElmExportError: nothing there, damaged files, no tokenizer, or a draft model of another one.
        MissingDependencyError: the engine is not installed, or the hub cannot be reached.
    """
    given = None if tokenizer is None else Path(tokenizer)
    draft = None if draft_model is None else str(draft_model)
    return OpenArtifact(open_text_model(Path(path), tokenizer=given, draft=draft))


def evaluate(
    artifact: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    against: str | None = "fp16",
    text_tokens: int = 8192,
    data: str | Path | None = None,
) -> Report:
    """Evaluate an artifact against the model it was made from, as `elmexport eval` does; the bundled task (cloze) where `tasks` is None.

    Raises:
        ElmExportError: unknown tasks, rows that are missing, models that cannot be compared.
        MissingDependencyError: an engine is not installed, or the hub cannot be reached.
    """
    names = None if tasks is None else ",".join(tasks) or "none"
    chosen = chosen_tasks(names, None, None)
    check_names(list(chosen))
    settings = Settings(chosen, limit, data=None if data is None else Path(data), text_tokens=text_tokens)
    return evaluate_with(Path(artifact), settings, against=against)
