"""Runtime of the Core ML packages that we export for GPUs: by the MIL executor, or on macOS by Core ML itself.

Their interface: `elmexport.contracts.coreml_gpu`. The mask that goes in is all zeros. The part that calls Core ML (`_CoreML`) has not been run
on Apple hardware.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from elmexport.contracts.coreml_gpu import CAUSAL_MASK, INPUT_IDS, KEY_CACHE, LOGITS, VALUE_CACHE
from elmexport.errors import ElmExportError
from elmexport.mil.coremltools_import import quiet_coremltools
from elmexport.mil.executor import MilModel, Precision, executor_name
from elmexport.mil.program import Program
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.batching import in_padded_batches
from elmexport.runtimes.coreml_engines import copied_prefix

CHUNK = 256  # tokens fed at once, so that the scores of long texts stay small


class _Engine(Protocol):
    name: str

    def logits(self, ids: NDArray[np.int32], position: int, wanted: bool) -> NDArray[np.float32]:
        """`[T, vocab]` of `ids` `[T]`; unless `wanted`, rows may be missing."""


class CoreMLGpuRuntime(Runtime):
    """A Core ML package for GPUs, with one sequence in its cache.

    Up to `CHUNK` tokens are fed at once; of tokens whose logits are not asked for, the head is not computed where the engine can leave it.
    """

    def __init__(self, program: Program, engine: _Engine) -> None:
        super().__init__()
        self.name = engine.name
        self.context, self.vocab_size = _sizes(program)
        self._engine = engine

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        rows, unwanted = [], len(ids) - last
        edges = [*range(0, unwanted, CHUNK), *range(unwanted, len(ids), CHUNK), len(ids)]
        for start, stop in pairwise(edges):
            logits = self._engine.logits(ids[start:stop].astype(np.int32), position + start, start >= unwanted)
            if start >= unwanted:
                rows.append(logits)
        return np.concatenate(rows)

    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        if not isinstance(self._engine, _MilEngine):
            return super()._continuations(continuations, position)
        engine = self._engine
        return in_padded_batches(continuations, self.context, position, lambda ids: engine.batch(ids.astype(np.int32), position))


class _MilEngine:
    """The MIL executor. `fp32` rounds nothing."""

    def __init__(self, program: Program, precision: Precision, budget: int | None) -> None:
        self.name = executor_name(precision)
        self.model = MilModel(program, precision=precision, budget=budget)
        self._states = self.model.make_states()

    def logits(self, ids: NDArray[np.int32], position: int, wanted: bool) -> NDArray[np.float32]:
        inputs = {INPUT_IDS: torch.from_numpy(ids[None]), CAUSAL_MASK: torch.zeros(1, 1, 1, position + len(ids))}
        results = self.model.run(inputs, self._states, outputs=(LOGITS,) if wanted else ())
        return results[LOGITS][0].numpy() if wanted else np.empty((0, 0), np.float32)

    def batch(self, ids: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        """`[batch, tokens, vocab]` of `ids` `[batch, tokens]`, each row after the first `position` tokens."""
        batch, length = ids.shape
        states = copied_prefix(self._states, batch, position, length)
        parts = []
        for start in range(0, length, CHUNK):
            part = torch.from_numpy(ids[:, None, start : start + CHUNK])
            mask = torch.zeros(1, 1, 1, position + start + part.shape[2])
            parts.append(self.model.run_batch({INPUT_IDS: part}, {CAUSAL_MASK: mask}, states, outputs=(LOGITS,))[LOGITS][:, 0])
        return torch.cat(parts, 1).numpy()


class _CoreML:
    """Core ML, on macOS 15 or later. Not run on Apple hardware."""

    name = "core ml"

    def __init__(self, path: Path) -> None:
        with quiet_coremltools():
            import coremltools

        self._model = coremltools.models.MLModel(str(path))
        self._state = self._model.make_state()

    def logits(self, ids: NDArray[np.int32], position: int, wanted: bool) -> NDArray[np.float32]:
        inputs = {INPUT_IDS: ids[None], CAUSAL_MASK: np.zeros((1, 1, 1, position + len(ids)), np.float16)}
        return np.asarray(self._model.predict(inputs, state=self._state)[LOGITS][0], dtype=np.float32)


def matches(program: Program) -> bool:
    """Whether `program` has the interface for GPUs, by the names of its default function."""
    function = program.function()
    found = (set(function.inputs), set(function.states), set(function.outputs))
    return found == ({INPUT_IDS, CAUSAL_MASK}, {KEY_CACHE, VALUE_CACHE}, {LOGITS})


def open_program(program: Program, package: Path, precision: Precision, budget: int | None = None) -> CoreMLGpuRuntime:
    """Open a package for which `matches` is true. `precision` and `budget` (see `MilModel`) are the MIL executor's.

    Raises:
        ElmExportError: sizes other than the interface's.
    """
    _sizes(program)
    return CoreMLGpuRuntime(program, _CoreML(package) if sys.platform == "darwin" else _MilEngine(program, precision, budget))


def _sizes(program: Program) -> tuple[int, int]:
    """Context and vocabulary.

    Raises:
        ElmExportError: a shape that the interface does not have.
    """
    function = program.function()
    kinds = {**function.inputs, **function.states, **function.output_types()}
    fixed = {INPUT_IDS: (1, None), CAUSAL_MASK: (1, 1, None, None)}
    keys, logits = kinds[KEY_CACHE].shape, kinds[LOGITS].shape
    if (
        any(kinds[name].shape != shape for name, shape in fixed.items())
        or keys != kinds[VALUE_CACHE].shape
        or (len(keys), len(logits)) != (4, 3)
        or logits[2] is None
    ):
        found = ", ".join(f"{name} {list(kind.shape)}" for name, kind in kinds.items())
        raise ElmExportError(f"{program.path} has the inputs of a language model for GPUs, but other shapes than those: {found}")
    _, _, context, _ = keys
    assert context is not None
    return context, logits[2]
