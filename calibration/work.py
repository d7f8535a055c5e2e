"""Checkpoints of a running calibration: the residual stream between two layers, and the results of the layers that are done.

In memory, or in a folder that a later run picks up where a killed one stopped. Files of a folder are read and written batch by batch, so
that only the system's file cache, which shrinks when memory is short, holds them.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor

from elmexport.documents import decode_json
from elmexport.errors import ElmExportError
from elmexport.files import MappedTensors, complete_file, read_metadata, write_safetensors

_METADATA_KEY = "elmexport.calibration_part"
_FIX = "calibrate again"


@dataclass(frozen=True)
class StageResult:
    """Results of one stage: tensors as `Statistics` has them, the peak of the residual stream, the peaks of norms."""

    tensors: Mapping[str, Tensor]
    residual_peak: float
    norm_peaks: Mapping[str, float]


class Boundary(Protocol):
    """Residual stream `[sequences, tokens, dim]` float32 before and after the stage that is running; batches come in order."""

    def read(self, batch: slice) -> Tensor: ...

    def write(self, batch: slice, x: Tensor) -> None: ...


class Work(ABC):
    """State of a running calibration. Stages are numbered from 0, the embedding, which reads no boundary."""

    @abstractmethod
    def stages_done(self) -> int:
        """Count the stages that need not run again."""

    @abstractmethod
    def boundary(self, stage: int, sequences: int, *, last: bool) -> AbstractContextManager[Boundary]:
        """Open the boundary of a stage that is to run; what the last one writes is not kept."""

    @abstractmethod
    def finish(self, stage: int, result: StageResult) -> None:
        """Keep the result of `stage`, which has run to its end."""

    @abstractmethod
    def results(self) -> list[StageResult]:
        """Read the results of all finished stages."""


class MemoryWork(Work):
    """State in memory: one tensor, overwritten batch by batch."""

    def __init__(self) -> None:
        self._results: list[StageResult] = []
        self._stream = torch.empty(0)

    def stages_done(self) -> int:
        return len(self._results)

    @contextmanager
    def boundary(self, stage: int, sequences: int, *, last: bool) -> Iterator[Boundary]:
        self._sequences = sequences
        yield self

    def read(self, batch: slice) -> Tensor:
        return self._stream[batch]

    def write(self, batch: slice, x: Tensor) -> None:
        if not self._stream.numel():
            self._stream = torch.empty(self._sequences, *x.shape[1:])
        self._stream[batch] = x

    def finish(self, stage: int, result: StageResult) -> None:
        self._results.append(result)

    def results(self) -> list[StageResult]:
        return self._results


class FolderWork(Work):
    """State in a folder: files `stream-K` (what stage K - 1 gave) and `part-K.safetensors`, each complete if it has its name."""

    def __init__(self, folder: Path, tokens: int, dim: int) -> None:
        """`tokens` and `dim`: of a sequence on the residual stream."""
        self._folder = folder
        self._sequence = (tokens, dim)
        folder.mkdir(parents=True, exist_ok=True)

    def stages_done(self) -> int:
        # A part is written after the stream that goes with it, and the stream before that one removed after both.
        count = 0
        while self._part(count).is_file():
            count += 1
        return count

    @contextmanager
    def boundary(self, stage: int, sequences: int, *, last: bool) -> Iterator[Boundary]:
        if last:
            yield _FileBoundary(self._stream(stage), None, self._sequence)
            return
        with complete_file(self._stream(stage + 1)) as partial, partial.open("wb") as sink:
            yield _FileBoundary(self._stream(stage), sink, self._sequence)

    def finish(self, stage: int, result: StageResult) -> None:
        figures = {"residual_peak": result.residual_peak, "norm_peaks": dict(result.norm_peaks)}
        with complete_file(self._part(stage)) as partial:
            write_safetensors(partial, result.tensors, {_METADATA_KEY: json.dumps(figures)})
        self._stream(stage).unlink(missing_ok=True)

    def results(self) -> list[StageResult]:
        return [self._read(self._part(stage)) for stage in range(self.stages_done())]

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, path: Path) -> StageResult:
        try:
            figures = decode_json(read_metadata(path, "part of a calibration", _FIX)[_METADATA_KEY])
            return StageResult(MappedTensors(path, _FIX), figures["residual_peak"], figures["norm_peaks"])
        except (ValueError, KeyError, TypeError):
            raise ElmExportError(f"{path} is damaged: its metadata cannot be read; {_FIX}") from None

    def _stream(self, stage: int) -> Path:
        return self._folder / f"stream-{stage}"

    def _part(self, stage: int) -> Path:
        return self._folder / f"part-{stage}.safetensors"


class _FileBoundary:
    def __init__(self, source: Path, sink: IO[bytes] | None, sequence: tuple[int, int]) -> None:
        self._source, self._sink, self._sequence = source, sink, sequence

    def read(self, batch: slice) -> Tensor:
        x = torch.empty(batch.stop - batch.start, *self._sequence)  # aligned as torch aligns: the last bits of a product depend on it
        with self._source.open("rb") as file:
            file.seek(batch.start * x[0].numel() * x.element_size())
            if file.readinto(x.numpy().data.cast("B")) != x.numel() * x.element_size():
                raise ElmExportError(f"{self._source} is shorter than it was written; {_FIX}")
        return x

    def write(self, batch: slice, x: Tensor) -> None:
        if self._sink is not None:
            self._sink.write(x.contiguous().numpy().data)
