"""Inputs of a method: the calibration text, statistics of activations, or neither, as the options ask for."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from calibration.calibrate import DEFAULT_TOKENS, make_sample
from calibration.collect import collect
from calibration.options import WeightOptions
from calibration.statistics import FORMAT, Statistics, load_statistics
from calibration.text import Sample, read_text
from elmexport import __version__
from elmexport.cache import cached_path, unwritable
from elmexport.checkpoint.base import Checkpoint
from elmexport.files import complete_file
from elmexport.progress import Progress


class Inputs:
    """Calibration inputs of one model, read or measured when they are asked for, once."""

    def __init__(self, checkpoint: Checkpoint, options: WeightOptions, progress: Progress, importance: Statistics | None = None) -> None:
        """`importance`: the statistics that the options' importance matrix holds."""
        self._checkpoint, self._options, self._progress, self._importance = checkpoint, options, progress, importance

    @property
    def asked_tokens(self) -> int | None:
        """Tokens of the text that the options ask for; None where they leave it open."""
        return self._options.tokens

    def with_tokens(self, tokens: int) -> Inputs:
        """The inputs of options that ask for `tokens` of the text."""
        return Inputs(self._checkpoint, replace(self._options, tokens=tokens), self._progress, self._importance)

    def without_text(self) -> Inputs:
        """The inputs of options that name no text."""
        return Inputs(self._checkpoint, WeightOptions(), self._progress)

    @cached_property
    def sample(self) -> Sample | None:
        """The calibration text in windows; None where the options name statistics, or nothing.

        Raises:
            ElmExportError: see `read_text` and `make_sample`.
        """
        if not self._options.reads_text:
            return None
        paths = [self._options.calibrate] if isinstance(self._options.calibrate, Path) else []
        tokens = DEFAULT_TOKENS if self._options.tokens is None else self._options.tokens
        return make_sample(self._checkpoint, [read_text(path, "--calibrate") for path in paths], text=paths, tokens=tokens)

    @cached_property
    def statistics(self) -> Statistics | None:
        """Statistics of the model's activations: those of a file, or measured on the text; None where there is neither.

        Raises:
            ElmExportError: see `sample`, `load_statistics` and `collect`.
        """
        if self.sample is not None:
            return _measured(self._checkpoint, self.sample, self._progress)
        if self._options.importance_matrix is not None:
            assert self._importance is not None, "whoever knows the format reads it"
            return self._importance
        return load_statistics(self._options.calibrate, self._checkpoint) if isinstance(self._options.calibrate, Path) else None


def _measured(checkpoint: Checkpoint, sample: Sample, progress: Progress) -> Statistics:
    """Statistics of `sample`, once for all formats and quantizations of a model: out of the cache where they have been measured before."""
    key = [FORMAT, __version__, checkpoint.source.name, checkpoint.identity(), sample.words, sample.sha256]
    path = cached_path("statistics", key, ".safetensors")
    if not path.is_file():
        statistics = collect(checkpoint, sample, progress=progress)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with complete_file(path) as partial:
                statistics.save(partial)
        except OSError as error:
            raise unwritable(path, error) from error
    return load_statistics(path, checkpoint)
